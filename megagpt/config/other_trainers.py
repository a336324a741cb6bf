"""Names of other trainers' keys, and what says the same here (L0, stdlib only)."""

_SAME = {
    "learning_rate lr max_lr": "schedule.peak_lr",
    "min_lr": "schedule.min_lr_ratio, a share of peak_lr",
    "max_iters max_steps num_steps train_steps train_iters n_steps steps iterations": (
        "schedule.total_tokens, in tokens: steps x schedule.batch_tokens"
    ),
    "epochs max_epochs num_epochs num_train_epochs": (
        "schedule.total_tokens, in tokens: epochs x tokens of the corpus"
    ),
    "warmup_iters warmup_steps lr_warmup_iters num_warmup_steps": (
        "schedule.warmup_tokens, in tokens: steps x the batch"
    ),
    "lr_decay_iters decay_steps": "schedule.decay_tokens, in tokens: steps x schedule.batch_tokens",
    "batch_size global_batch_size train_batch_size total_batch_size": (
        "schedule.batch_tokens, in tokens over all ranks: sequences x model.n_ctx"
    ),
    "micro_batch_size device_batch_size per_device_train_batch_size "
    "train_micro_batch_size_per_gpu": "parallel.micro_batch, in sequences of a rank",
    "gradient_accumulation_steps grad_accum_steps grad_accum accumulate_grad_batches": (
        "leave it out; it follows from schedule.batch_tokens, parallel.micro_batch and the ranks"
    ),
    "block_size ctx_len context_len max_length seq_len seq_length sequence_length context_length "
    "max_seq_len n_positions max_position_embeddings": "model.n_ctx, in tokens",
    "n_embd hidden_size embed_dim dim d_embed": "model.d_model",
    "n_layers num_layers num_hidden_layers": "model.n_layer",
    "n_heads num_heads num_attention_heads": "model.n_head",
    "make_vocab_size_divisible_by": "model.vocab_multiple",
    "zero_stage zero deepspeed_config deepspeed": 'parallel.ds_config: "zero1", "zero2", "zero3"',
    "tensor_model_parallel_size tensor_parallel tp": "parallel.tensor",
    "pipeline_model_parallel_size pipeline_parallel pp": "parallel.pipeline",
    "precision bf16 fp16 mixed_precision": 'parallel.dtype: "bf16", "fp16" or "fp32"',
    "gradient_checkpointing activation_checkpointing checkpoint_activations": (
        'parallel.recompute: "none" or "full"'
    ),
    "grad_clip clip_grad max_grad_norm max_norm": "optimizer.gradient_clipping",
    "beta1 beta2 adam_beta1 adam_beta2": "optimizer.betas, a list of both",
    "adam_eps adam_epsilon epsilon": "optimizer.eps",
    "wd": "optimizer.weight_decay",
    "out_dir output_dir save_dir": "output",
    "dataset data_dir data_path train_data": 'data.train: [{ path = "data/x" }]',
    "save_interval save_steps save_every ckpt_interval": "checkpoint.every_tokens, in tokens",
    "eval_interval eval_steps eval_every": "evaluate.every_tokens, in tokens",
    "eval_iters": "evaluate.batches",
    "log_interval logging_steps": "log.every_steps",
    "wandb_project": "log.wandb",
    "num_gpus n_gpus gpus ngpus world_size nproc_per_node num_nodes nnodes": (
        "leave it out; ranks are the launcher's: megagpt train RUN.toml --ranks N"
    ),
    "device accelerator": "leave it out; each rank takes a GPU of its host, or the CPU without one",
}
"""Names, separated by blanks -> the key here, and its unit where that is another one."""
HERE = {name: key for names, key in _SAME.items() for name in names.split()}
"""Another trainer's name -> what says the same here."""
