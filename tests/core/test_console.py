from hf_curriculum.core.console import format_cell, render_table


def test_cells_are_short_and_gaps_are_dashes():
    cells = [format_cell(value) for value in (None, float("nan"), 0.123456, 12345678, 123456.7, "x", True)]
    assert cells == ["-", "-", "0.1235", "12,345,678", "123,457", "x", "True"]


def test_table_keeps_its_title_whole_and_aligns_numbers():
    title = "A title that is much longer than the table below it, and must stay on one line of its own"
    lines = render_table(title, ("name", "value"), [["a", 1], ["ß→日本", 1000]]).splitlines()
    assert lines[0] == title
    assert lines[-2].endswith("    1")
    assert lines[-1].endswith("1,000")


def test_markup_in_a_cell_is_shown_as_it_is():
    assert "[bold]x[/bold]" in render_table("t", ("c",), [["[bold]x[/bold]"]])
