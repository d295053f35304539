"""The subcommands of `hf-curriculum`: each a module with `add`, which adds its parser."""
