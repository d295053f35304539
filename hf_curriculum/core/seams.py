"""
The private places of other libraries that this package steps into, in one list.

A test compares every signature with the installed version, so that an upgrade that moves one fails there and not in a
user's run. Public seams (callbacks, `log`, `train`, `evaluation_loop`, `num_examples`) are not listed.
"""

__all__ = ["PRIVATE_SEAMS"]

# `module.Class.method` -> signature. Read in torch 2.13, transformers 5.23 and trl 1.16.
PRIVATE_SEAMS = {
    "torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup._init_mp_dtypes": "(self)",
    "torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState._lazy_init": "(self)",
    "torch.nn.parallel.DistributedDataParallel._build_debug_param_to_name_mapping": "(self, parameters)",
    "torch.nn.parallel.DistributedDataParallel._build_params_for_reducer": "(self)",
    "torch.nn.parallel.DistributedDataParallel._ddp_init_helper": (
        "(self, parameters, expect_sparse_gradient, param_to_name_mapping, static_graph)"
    ),
    "transformers.Trainer._get_collator_with_removed_columns": "(self, data_collator, description=None)",
    "transformers.Trainer._get_dataloader": (
        "(self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None)"
    ),
    "transformers.Trainer._get_output_dir": "(self, trial)",
    "transformers.Trainer._get_train_sampler": "(self, train_dataset=None)",
    "transformers.Trainer._load_best_model": "(self)",
    "transformers.Trainer._load_from_checkpoint": "(self, resume_from_checkpoint, model=None)",
    "transformers.Trainer._prepare_inputs": "(self, inputs)",
    "transformers.Trainer._remove_unused_columns": "(self, dataset, description=None)",
    "transformers.Trainer._save": "(self, output_dir=None, state_dict=None)",
    "transformers.Trainer._save_checkpoint": "(self, model, trial)",
    "transformers.Trainer._save_rng_state": "(self, output_dir)",
    "transformers.Trainer._set_signature_columns_if_needed": "(self)",
    "trl.SFTTrainer._prepare_dataset": (
        "(self, dataset, processing_class, args, packing, formatting_func, dataset_name)"
    ),
    "trl.SFTTrainer._reject_skip_prepare_without_labels": "(self, datasets, data_collator)",
    "trl.SFTTrainer._set_signature_columns_if_needed": "(self)",
}
