"""What other trainers call it, and the name it has here.

The names are those of axolotl, LLaMA-Factory, TRL, transformers `TrainingArguments`, PEFT `LoraConfig` and Ray. They are only
consulted for keys that are unknown where they stand.
"""

from __future__ import annotations

BLUEPRINT, EXPERIMENT = "blueprint", "experiment"

_BLUEPRINT_NAMES: dict[str, str] = {
    "lora.init": "init_lora_weights lora_init peft_init_lora_weights",
    "lora.rank": "r lora_r lora_rank",
    "lora.alpha": "lora_alpha",
    "lora.use_rslora": "rslora lora_use_rslora peft_use_rslora",
    "lora.plus_ratio": "loraplus_lr_ratio lora_plus_lr_ratio lora_plus_ratio loraplus_ratio",
    "lora.freeze_a": "lora_fa use_lora_fa freeze_lora_a",
    "lora.dropout": "lora_dropout",
    "lora.exclude": "exclude_modules lora_exclude_modules",
    "lora.layers": "layers_to_transform peft_layers_to_transform",
    "lora.use_dora": "dora peft_use_dora lora_use_dora",
    "lora.modules_to_save": "lora_modules_to_save additional_target",
    "lora.targets": "lora_target lora_target_modules lora_target_linear target_modules",
    "base.model": (
        "base_model model_name_or_path model_name model_id pretrained_model_name_or_path model hf_model_id checkpoint_dir"
    ),
    "base.revision": "model_revision",
    "base.chat_template": "chat_template_jinja chat_template_path",
    "base.hidden_size": "hidden_dim d_model n_embd",
    "base.layers": "num_hidden_layers n_layer num_layers",
    "base.heads": "num_attention_heads n_head",
    "base.key_value_heads": "num_key_value_heads num_kv_heads",
    "base.head_size": "head_dim",
    "base.vocabulary": "vocab_size",
    "optimizer.learning_rate": "lr max_lr peak_lr",
    "optimizer.beta1": "adam_beta1",
    "optimizer.beta2": "adam_beta2",
    "optimizer.epsilon": "adam_epsilon eps",
    "optimizer.weight_decay": "wd",
    "optimizer.clip": "max_grad_norm gradient_clipping grad_clip",
    "optimizer.type": "optim optimizer_type optim_type",
    "schedule.final_fraction": "min_lr_rate min_lr_ratio cosine_min_lr_ratio min_lr",
    "schedule.decay_fraction": "num_decay_steps",
    "schedule.warmup_fraction": "warmup_ratio warmup_steps warmup",
    "schedule.decay": "lr_scheduler lr_scheduler_type lr_schedule",
    "lanes.sequence_length": (
        "sequence_len cutoff_len max_seq_length max_seq_len max_length block_size context_length seq_len model_max_length"
    ),
    "lanes.rows_per_microstep": (
        "micro_batch_size per_device_train_batch_size per_device_batch_size gradient_accumulation_steps grad_accum"
    ),
    "lanes.rows_per_step": "batch_size global_batch_size train_batch_size",
}

_EXPERIMENT_NAMES: dict[str, str] = {
    "body.workers": "num_workers world_size ray_num_workers",
    "body.gpus_per_worker": "num_gpus gpus use_gpu resources_per_worker",
    "body.cpus_per_worker": "num_cpus",
    "body.zero_stage": "zero deepspeed stage",
    "body.offload": "offload_param",
    "body.precision": "bf16 fp16 dtype torch_dtype",
    "body.activation_checkpointing": "gradient_checkpointing",
    "body.compile": "torch_compile",
    "body.quantization": "load_in_4bit load_in_8bit quantization_bit quantization_config quantization_method",
    "population.tokens_per_variant": "num_train_epochs num_epochs epochs max_steps max_tokens steps",
    "population.variants": "num_samples population_size n_variants",
    "population.search": "param_space hyperparameters search_space",
    "population.search.rows_per_step": "batch_sizes",
    "population.epigenomes.mixes": "mix mixture interleave_probs mixes dataset_weights",
    "population.epigenomes.mixes.like": "from parent base_mix",
    "population.epigenomes.mixes.cross": "crossover crossovers",
    "population.reports": "eval_steps logging_steps save_steps evals_per_epoch",
    "population.scheduler.grace_reports": "grace_period",
    "population.scheduler.reduction_factor": "eta",
    "population.scheduler.perturb_every_reports": "perturbation_interval",
    "population.scheduler.quantile": "quantile_fraction",
    "population.scheduler.mutate": "hyperparam_mutations",
    "genome.sources": "datasets dataset data train_file dataset_path",
    "genome.split.select": "val_set_size",
    "genome.split.report": "test_size",
    "genome.sources.licence": "license",
    "genome.sources.text_key": "text_column dataset_text_field field",
    "genome.sources.messages_key": "field_messages messages conversations",
    "merge.method": "merge_method",
    "rng_seed": "seed random_seed random_state",
    "name": "run_name",
    "tracking.project": "wandb_project project_name",
    "tracking.entity": "wandb_entity",
    "tracking.wandb": "wandb_mode report_to use_wandb",
}

# their name -> (the file it stands in here, its dotted path there)
SYNONYMS: dict[str, tuple[str, str]] = {
    name: (home, path)
    for home, names in ((BLUEPRINT, _BLUEPRINT_NAMES), (EXPERIMENT, _EXPERIMENT_NAMES))
    for path, theirs in names.items()
    for name in theirs.split()
}

# Where the other trainer counts in another unit, what to write instead.
CONVERSIONS: dict[str, str] = {
    "warmup_steps": "it is a share of the steps, e.g. 0.05",
    "num_train_epochs": "budgets are tokens, not epochs",
    "num_epochs": "budgets are tokens, not epochs",
    "epochs": "budgets are tokens, not epochs",
    "max_steps": "budgets are tokens: steps x rows_per_step x sequence_length",
    "steps": "budgets are tokens: steps x rows_per_step x sequence_length",
    "gradient_accumulation_steps": "it is rows_per_step / steps of accumulation",
    "grad_accum": "it is rows_per_step / steps of accumulation",
    "eval_steps": "it is how often a variant reports over its whole budget",
    "save_steps": "it is how often a variant reports over its whole budget",
    "logging_steps": "it is how often a variant reports over its whole budget",
    "bf16": "write precision: bf16",
    "fp16": "write precision: bf16 (fp16 needs a loss scale shared by all variants)",
    "gradient_checkpointing": "write activation_checkpointing: true",
    "load_in_4bit": "write quantization: nf4",
    "load_in_8bit": "write quantization: int8",
    "deepspeed": "write zero_stage: 3; there is no other DeepSpeed file",
    "use_gpu": "write gpus_per_worker: 1",
    "use_wandb": "write wandb: offline, online or disabled",
    "report_to": "write wandb: offline, online or disabled",
    "seed": "`seed` is the state of a variant, never a random number",
}

_OTHER_KIND = "a kind of adapter other than LoRA is written as adapter: {type: ...} in the blueprint, beside lora"
_DROPOUT = "peft draws it anew at every look, and a variant that goes on from its seed would see another; leave it out"

# Known elsewhere, deliberately absent here.
ABSENT: dict[str, str] = {
    "trust_remote_code": "code from a model repository is never run",
    "use_vera": _OTHER_KIND,
    "use_oft": _OTHER_KIND,
    "peft_type": _OTHER_KIND,
    "rank_dropout": _DROPOUT,
    "module_dropout": _DROPOUT,
    "vera_dropout": _DROPOUT,
    "boft_dropout": _DROPOUT,
    "miss_dropout": _DROPOUT,
    "layers_pattern": "the first number in a module's name is its layer; leave it out, and name modules in full if it is not",
    "boft_n_butterfly_factor": "peft takes more than one only with CUDA code that it compiles itself, else silently one",
    "output_dir": "a run is written to runs/NAME; choose `name`",
    "include": "one experiment is one file; there are no includes",
    "defaults": "one experiment is one file; there are no includes",
}

# Of a source that has a `glob`.
GLOBS = ("include", "includes", "pattern", "patterns", "files", "extensions", "suffixes")
