"""
The private places of other libraries that this package steps into, in one list.

A test compares every signature with the installed version, so that an upgrade that moves one fails there and not in a
user's run. Public seams (callbacks, `log`, `train`, `evaluation_loop`, `num_examples`) are not listed.
"""

__all__ = ["PRIVATE_SEAMS"]

# `module.Class.method` -> signature. Read in transformers 5.23 and trl 1.16.
PRIVATE_SEAMS = {
    "transformers.Trainer._get_collator_with_removed_columns": "(self, data_collator, description=None)",
    "transformers.Trainer._get_dataloader": (
        "(self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None)"
    ),
    "transformers.Trainer._get_output_dir": "(self, trial)",
    "transformers.Trainer._get_train_sampler": "(self, train_dataset=None)",
    "transformers.Trainer._prepare_inputs": "(self, inputs)",
    "transformers.Trainer._remove_unused_columns": "(self, dataset, description=None)",
    "transformers.Trainer._save_checkpoint": "(self, model, trial)",
    "transformers.Trainer._save_rng_state": "(self, output_dir)",
    "transformers.Trainer._set_signature_columns_if_needed": "(self)",
    "trl.SFTTrainer._prepare_dataset": (
        "(self, dataset, processing_class, args, packing, formatting_func, dataset_name)"
    ),
    "trl.SFTTrainer._reject_skip_prepare_without_labels": "(self, datasets, data_collator)",
    "trl.SFTTrainer._set_signature_columns_if_needed": "(self)",
}
