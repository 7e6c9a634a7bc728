"""How every argument that Megatron-LM (core_v0.16.1) keeps in a checkpoint is treated, and every field of its
core's config.

MAPPED are read (megatron_args.py), LACKING must have a value that means their absence, HARMLESS change
nothing that the weights compute. Values of others are told. tests/hybridtrain/formats/test_config_fields.py
walks the fields of the installed megatron-core.
"""

from __future__ import annotations

from typing import Any

# another name of the same thing: the field of megatron-core, which Megatron-LM 0.16 names its arguments by,
# and the older argument
ALIASES = {
    "layernorm_epsilon": "norm_epsilon",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    "num_moe_experts": "num_experts",
}

_MAPPED = """
disable_bias_linear ffn_hidden_size group_query_attention hidden_size kv_channels layernorm_epsilon
max_position_embeddings moe_ffn_hidden_size moe_layer_freq moe_router_bias_update_rate
moe_router_enable_expert_bias moe_router_group_topk moe_router_load_balancing_type moe_router_num_groups
moe_router_pre_softmax moe_router_score_function moe_router_topk moe_router_topk_scaling_factor
moe_shared_expert_intermediate_size norm_epsilon num_attention_heads num_experts num_layers
num_moe_experts num_query_groups qk_layernorm rotary_base softmax_scale
untie_embeddings_and_output_weights
"""

# What the arguments may say that our model does not have: argument, values that mean its absence, what it
# is.
LACKING: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    (
        "multi_latent_attention",
        (None, False),
        "multi-head latent attention (MLA): keys and values here have full width",
    ),
    ("add_bias_linear", (None, False), "biases"),
    ("add_qkv_bias", (None, False), "biases of queries, keys and values"),
    ("normalization", (None, "RMSNorm"), "norms other than RMSNorm"),
    ("apply_layernorm_1p", (None, False), "norm weights less one"),
    ("apply_residual_connection_post_layernorm", (None, False), "the residual stream after its norm"),
    ("swiglu", (None, True), "an activation other than SwiGLU"),
    ("gated_linear_unit", (None, True), "an activation other than SwiGLU"),
    ("activation_func", (None,), "an activation other than SwiGLU"),
    ("squared_relu", (None, False), "an activation other than SwiGLU"),
    ("quick_geglu", (None, False), "an activation other than SwiGLU"),
    ("activation_func_clamp_value", (None,), "a bound on the activation"),
    ("glu_linear_offset", (None, 0), "an offset in the activation"),
    ("position_embedding_type", (None, "rope"), "positions other than rotary ones"),
    ("rotary_percent", (None, 1), "rotations of a part of each head"),
    ("rotary_interleaved", (None, False), "rotations of neighbours; those of halves are read"),
    ("rotary_seq_len_interpolation_factor", (None, 1), "scaled rotations"),
    ("use_rope_scaling", (None, False), "scaled rotations"),
    ("rope_type", (None, "rope"), "scaled rotations"),
    ("mrope_section", (None,), "rotations by several positions"),
    ("no_rope_freq", (None,), "layers without positions"),
    ("qk_l2_norm", (None, False), "a norm of queries and keys without weights"),
    ("attention_output_gate", (None, False), "a gate after attention"),
    ("softmax_type", (None, "vanilla"), "attention with a sink"),
    ("window_size", (None,), "attention to a sliding window"),
    ("experimental_attention_variant", (None,), "mixers other than attention"),
    ("linear_attention_type", (None,), "mixers other than attention"),
    ("linear_attention_freq", (None,), "mixers other than attention"),
    ("is_hybrid_model", (None, False), "mixers other than attention"),
    ("hybrid_override_pattern", (None,), "mixers other than attention"),
    ("hybrid_attention_ratio", (None, 0), "mixers other than attention"),
    ("hybrid_mlp_ratio", (None, 0), "mixers other than attention"),
    ("spec", (None,), "layers of a specification of its own"),
    ("use_legacy_models", (None, False), "a model of Megatron-LM before its core"),
    ("heterogeneous_block_specs", (None, False), "layers of different shapes"),
    ("heterogeneous_layers_config_path", (None,), "layers of different shapes"),
    ("heterogeneous_layers_config_encoded_json", (None, ""), "layers of different shapes"),
    ("mtp_num_layers", (None, 0), "heads that predict further tokens"),
    ("moe_shared_expert_gate", (None, False), "a gate on the shared experts"),
    ("moe_latent_size", (None,), "experts of another width than the stream"),
    ("moe_apply_probs_on_input", (None, False), "gates before the experts"),
    ("moe_expert_capacity_factor", (None,), "experts that drop tokens by the batch"),
    ("moe_router_force_load_balancing", (None, False), "routing by chance"),
    ("moe_router_topk_limited_devices", (None,), "groups of experts by device"),
)

# only together with what LACKING refuses
_OF_LACKING = """
beta_fast beta_slow cache_mla_latents dsa_indexer_head_dim dsa_indexer_loss_coeff dsa_indexer_n_heads
dsa_indexer_topk dsa_indexer_use_sparse_loss kv_lora_rank linear_conv_kernel_dim linear_key_head_dim
linear_num_key_heads linear_num_value_heads linear_value_head_dim mamba_head_dim mamba_num_groups
mamba_num_heads mamba_state_dim moe_pad_expert_input_to_capacity moe_token_drop_policy moe_token_dropping
mscale mscale_all_dim mtp_loss_scaling_factor mtp_standalone original_max_position_embeddings q_lora_rank
qk_head_dim qk_pos_emb_head_dim relative_attention_max_distance relative_attention_num_buckets
rope_scaling_factor rotary_scaling_factor use_mamba_mem_eff_path v_head_dim window_attn_skip_freq
"""

# how a model is spread over ranks and computed, what it is initialised with, regularisation in training
_COMPUTING = """
_cpu_offloading_context account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
activation_func_fp8_input_store apply_query_key_layer_scaling apply_rope_fusion
async_tensor_model_parallel_allreduce attention_backend attention_dropout attention_softmax_in_fp32
autocast_dtype barrier_with_L1_time batch_invariant_mode batch_p2p_comm batch_p2p_sync bf16
bias_activation_fusion bias_dropout_fusion calculate_per_token_loss clone_scatter_output_in_embedding
config_logger_dir context_parallel_size cp_comm_type cpu_offloading cpu_offloading_activations
cpu_offloading_double_buffering cpu_offloading_num_layers cpu_offloading_weights cross_entropy_fusion_impl
cross_entropy_loss_fusion cuda_graph_impl cuda_graph_retain_backward_graph cuda_graph_scope
cuda_graph_use_single_mempool cuda_graph_warmup_steps deallocate_pipeline_outputs
defer_embedding_wgrad_compute delay_wgrad_compute deterministic_mode disable_bf16_reduced_precision_matmul
disable_mamba_mem_eff_path disable_parameter_transpose_cache distribute_saved_activations
embedding_init_method embedding_init_method_std enable_autocast enable_cuda_graph
ep_overlap_early_attn_memory_release expert_model_parallel_size expert_tensor_parallel_size
external_cuda_graph finalize_model_grads_func fine_grained_activation_offloading first_last_layers_bf16
flash_decode fp16 fp32_residual_connection fp4 fp4_format fp4_param fp4_param_gather fp4_quantizer_factory
fp4_recipe fp8 fp8_amax_compute_algo fp8_amax_history_len fp8_dot_product_attention fp8_format
fp8_interval fp8_margin fp8_multi_head_attention fp8_param fp8_quantizer_factory fp8_recipe fp8_wgrad
fused_single_qkv_rope grad_scale_func grad_sync_func gradient_accumulation_fusion
hetereogenous_dist_checkpoint hidden_dropout hierarchical_context_parallel_sizes hybrid_context_parallel
inference_fuse_tp_communication inference_rng_tracker inference_sampling_seed init_method init_method_std
init_model_with_meta_device kitchen_attention_backend log_max_attention_logit masked_softmax_fusion
max_seqlen_per_dp_cp_rank memory_efficient_layer_norm microbatch_group_size_per_virtual_pipeline_stage
microbatch_group_size_per_vp_stage min_offloaded_tensor_size mlp_chunks_for_prefill moe_aux_loss_coeff
moe_deepep_num_sms moe_enable_deepep moe_enable_routing_replay moe_extended_tp moe_flex_dispatcher_backend
moe_grouped_gemm moe_hybridep_num_sms moe_input_jitter_eps moe_layer_recompute moe_per_layer_logging
moe_permute_fusion moe_router_dtype moe_router_fusion moe_router_padding_for_fp8
moe_router_padding_for_quantization moe_shared_expert_overlap moe_token_dispatcher_type
moe_use_legacy_grouped_gemm moe_z_loss_coeff no_barrier_with_level_1_timing no_initialization no_sync_func
num_layers_at_end_in_bf16 num_layers_at_start_in_bf16 num_layers_in_first_pipeline_stage
num_layers_in_last_pipeline_stage num_microbatches_with_partial_activation_checkpoints offload_modules
output_layer_init_method overlap_moe_expert_parallel_comm overlap_p2p_comm overlap_p2p_comm_warmup_flush
overlap_p2p_communication_warmup_flush param_sync_func params_dtype perform_initialization
persist_layer_norm pipeline_dtype pipeline_model_parallel_comm_backend pipeline_model_parallel_layout
pipeline_model_parallel_size qk_clip qk_clip_alpha qk_clip_threshold quant_recipe recompute_granularity
recompute_method recompute_modules recompute_num_layers sequence_parallel symmetric_ar_type te_rng_tracker
tensor_model_parallel_size test_mode timers tp_comm_atomic_ag tp_comm_atomic_rs tp_comm_bootstrap_backend
tp_comm_bulk_dgrad tp_comm_bulk_wgrad tp_comm_overlap tp_comm_overlap_ag tp_comm_overlap_disable_fc1
tp_comm_overlap_disable_qkv tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_split_rs
tp_only_amax_red transformer_impl use_cpu_initialization use_fused_weighted_squared_relu
use_inference_optimized_layers use_kitchen use_kitchen_attention use_ring_exchange_p2p
use_te_activation_func use_te_rng_tracker variable_seq_lengths virtual_pipeline_model_parallel_size
wgrad_deferral_limit
"""

# training, data, saving and logging
_TRAINING = """
accumulate_allreduce_grads_in_fp32 adam_beta1 adam_beta2 adam_eps add_position_embedding adlr_autoresume
adlr_autoresume_interval align_grad_reduce align_param_gather allow_ambiguous_pad_tokens app_tag_run_name
app_tag_run_version apply_wd_to_qk_layernorm async_save auto_detect_ckpt_format batch_size
bert_binary_head bert_embedder_type bert_load bias_gelu_fusion bias_swiglu_fusion biencoder_projection_dim
biencoder_shared_query_context_model block_data_path calc_ft_timeouts check_for_large_grads
check_for_nan_in_loss check_for_nan_in_loss_and_grad check_for_spiky_loss
check_weight_hash_across_dp_replicas_interval checkpoint_activations ckpt_assume_constant_structure
ckpt_convert_format ckpt_convert_save ckpt_convert_update_legacy_dist_opt_format ckpt_format
ckpt_fully_parallel_load ckpt_fully_parallel_save ckpt_fully_parallel_save_deprecated ckpt_step
classes_fraction clip_grad consumed_train_bins consumed_train_samples consumed_valid_samples
create_all_gather_group create_attention_mask_in_dataloader curr_iteration data_args_path data_cache_path
data_parallel_random_init data_parallel_sharding_strategy data_parallel_size data_path
data_per_class_fraction data_sharding dataloader_defer_npy_index_mmap dataloader_fast_cache_load
dataloader_type ddp_average_in_collective ddp_bucket_size ddp_num_buckets
ddp_pad_buckets_for_high_nccl_busbw ddp_reduce_scatter_with_fp32_accumulation decode_only_cuda_graphs
decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers decoder_num_layers decoder_seq_length
decoupled_lr decoupled_min_lr decrease_batch_size_if_needed deprecated_use_mcore_models
dino_bottleneck_size dino_freeze_last_layer dino_head_hidden_size dino_local_crops_number
dino_local_img_size dino_norm_last_layer dino_teacher_temp dino_warmup_teacher_temp
dino_warmup_teacher_temp_epochs disable_chunked_prefill disable_jit_fuser disable_straggler_on_startup
disable_symmetric_registration dist_ckpt_format_deprecated dist_ckpt_optim_fully_reshardable
dist_ckpt_save_pre_mcore_014 dist_ckpt_strictness distrib_optim_fully_reshardable_mem_efficient
distributed_backend distributed_timeout_minutes distributed_timeout_seconds_after_init do_test do_train
do_valid dump_param_to_param_group_map embedding_path empty_unused_memory_level enable_experimental
enable_ft_package enable_full_sharding_in_hsdp enable_gloo_process_groups enable_msc enable_one_logger
encoder_num_layers encoder_seq_length end_weight_decay eod_mask_loss error_injection_rate
error_injection_type eval_interval eval_iters evidence_data_path exit_duration_in_mins exit_interval
exit_on_missing_checkpoint exit_signal exit_signal_handler exit_signal_handler_for_dataloader
exp_avg_dtype exp_avg_sq_dtype fake_process_group filter_warnings fim_data fim_eod_token fim_fragment_rate
fim_middle_token fim_no_prefix fim_pad_token fim_prefix_token fim_rate fim_split_sample fim_spm_rate
fim_suffix_token finetune fp16_lm_cross_entropy fp8_param_gather fsdp_double_buffer
fsdp_manual_registration ft_num_warmup_iters full_validation global_batch_size grad_reduce_in_bf16
gradient_reduce_div_fusion grpo_clamp_eps_lower grpo_clamp_eps_upper grpo_entropy_term_weight
grpo_filter_groups_with_same_reward grpo_group_size grpo_iterations grpo_kl_beta grpo_prompts_per_step
grpo_samples_per_iteration head_lr_mult high_priority_stream_groups hysteresis ict_head_size ict_load
img_h img_w indexer_batch_size indexer_log_interval inference_batch_times_seqlen_threshold
inference_coordinator_port inference_dynamic_batching inference_dynamic_batching_block_size
inference_dynamic_batching_buffer_size_gb inference_dynamic_batching_cuda_graph_max_tokens
inference_dynamic_batching_cuda_graph_mixed_prefill_count inference_dynamic_batching_max_requests
inference_dynamic_batching_max_tokens inference_dynamic_batching_num_cuda_graphs
inference_dynamic_batching_paused_buffer_size_gb inference_dynamic_batching_track_paused_request_events
inference_dynamic_batching_unified_memory_level inference_logging_step_interval inference_max_batch_size
inference_max_seq_length inference_wandb_logging init_method_xavier_uniform initial_loss_scale
inprocess_active_world_size inprocess_barrier_timeout inprocess_completion_timeout
inprocess_empty_cuda_cache inprocess_granularity inprocess_hard_timeout inprocess_heartbeat_interval
inprocess_heartbeat_timeout inprocess_last_call_wait inprocess_max_iterations
inprocess_monitor_process_interval inprocess_monitor_thread_interval inprocess_progress_watchdog_interval
inprocess_restart inprocess_soft_timeout inprocess_termination_grace_time iter_per_epoch iteration
iterations_to_skip keep_fp8_transpose_cache kitchen_config_file kitchen_recipe_number langrl_env_config
langrl_external_server langrl_inference_server_conversation_template langrl_inference_server_type
lazy_mpu_init legacy_tokenizer load load_main_params_from_ckpt load_optim load_rng local_rank
log_device_memory_used log_energy log_interval log_l2_norm_grad_to_tensorboard
log_loss_scale_to_tensorboard log_memory_interval log_memory_to_tensorboard log_num_zeros_in_grad
log_params_norm log_progress log_runtime_to_tensorboard log_straggler log_throughput
log_throughput_to_tensorboard log_timers_to_tensorboard log_validation_ppl_to_tensorboard
log_world_size_to_tensorboard logging_level loss_scale loss_scale_window lr lr_decay_iters
lr_decay_samples lr_decay_steps lr_decay_style lr_warmup_fraction lr_warmup_init lr_warmup_iters
lr_warmup_samples lr_warmup_steps lr_wsd_decay_iters lr_wsd_decay_samples lr_wsd_decay_style
main_grads_dtype main_params_dtype make_vocab_size_divisible_by manual_gc manual_gc_eval
manual_gc_interval mask_factor mask_prob mask_type max_tokens_to_oom memory_keys memory_snapshot_path
merge_file micro_batch_size mid_level_dataset_surplus min_loss_scale min_lr mmap_bin_files mock_data
model_parallel_size model_type modelopt_enabled modules_to_filter moe_pad_experts_for_cuda_graph_inference
moe_upcycling_granularity moe_use_upcycling most_recent_k multiple_validation_sets muon_extra_scale_factor
muon_fp32_matmul_prec muon_momentum muon_num_ns_steps muon_scale_mode muon_split_qkv muon_tp_mode
muon_use_nesterov nccl_all_reduce_for_prefill nccl_communicator_config_path nccl_ub no_load_optim
no_load_rng no_persist_layer_norm no_save_optim no_save_rng no_weight_decay_cond_type
non_persistent_ckpt_type non_persistent_global_ckpt_dir non_persistent_local_ckpt_algo
non_persistent_local_ckpt_dir non_persistent_save_interval num_channels num_classes
num_dataset_builder_threads num_distributed_optimizer_instances num_floating_point_operations_so_far
num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank num_workers nvtx_ranges
object_storage_cache_path one_logger_async one_logger_project one_logger_run_name onnx_safe openai_gelu
optimizer optimizer_cpu_offload optimizer_offload_fraction outer_dp_sharding_strategy
output_bert_embeddings overlap_cpu_optimizer_d2h_h2d overlap_grad_reduce overlap_param_gather
overlap_param_gather_with_optimizer_step override_opt_param_scheduler padded_vocab_size patch_dim
per_dataset_sequences_path per_split_data_args_path perform_rl_step phase_transition_iterations
pin_cpu_grads pin_cpu_params pretrained_checkpoint profile profile_ranks profile_step_end
profile_step_start query_in_block_prob rampup_batch_size rank recompute_activations record_memory_history
record_shapes refit_method replication replication_factor replication_jump rerun_mode reset_attention_mask
reset_position_ids result_rejected_tracker_filename retriever_report_topk_accuracies
retriever_score_scaling reuse_grad_buf_for_mxfp8_param_ag rl_default_temperature rl_default_top_k
rl_default_top_p rl_importance_sampling_truncation_coef rl_inference_expert_model_parallel_size
rl_inference_expert_tensor_model_parallel_size rl_inference_logprobs_is_correction
rl_inference_model_unified_memory_level rl_inference_pipeline_model_parallel_size
rl_inference_tensor_model_parallel_size rl_offload_inference_model_weights_when_idle
rl_offload_kv_cache_during_training rl_offload_optimizer_during_inference rl_parallel_generation_tasks
rl_partial_rollouts rl_prompts_per_eval rl_remove_kv_cache_during_training rl_reset_cuda_graphs
rl_sequence_packing_algo rl_sequence_packing_max_sequences_per_bin rl_skip_bos_token
rl_training_cuda_graphs rl_use_sequence_packing rl_verify_model_weights_swap run_workload_inspector_server
runtime_time_unit sample_rate save save_config_filepath save_dgrads_interval save_interval save_optim
save_retain_interval save_rng save_tokenizer_assets save_wgrads_interval
scatter_gather_tensors_in_pipeline seed seq_length set_level_for_all_loggers sft
sft_tokenizer_prompt_format sgd_momentum sharp_enabled_group short_seq_prob skip_train
skipped_train_samples split start_weight_decay straggler_ctrlr_port straggler_minmax_count
strict_fsdp_dtensor_load suggested_communication_unit_size swin_backbone_type te_precision_config_file
tensorboard_dir tensorboard_log_interval tensorboard_queue_size test_data_path throughput_window_size
tiktoken_num_special_tokens tiktoken_pattern tiktoken_special_tokens timing_log_level timing_log_option
titles_data_path to_test tokenizer_hf_include_special_tokens tokenizer_hf_use_fast tokenizer_metadata
tokenizer_model tokenizer_sentencepiece_legacy tokenizer_special_tokens tokenizer_type
torch_fsdp2_reshard_after_forward tp_comm_overlap_cfg train_data_path train_iters train_samples
train_sync_interval transformer_pipeline_model_parallel_size trust_remote_code use_checkpoint_args
use_checkpoint_opt_param_scheduler use_custom_fsdp use_dist_ckpt use_dist_ckpt_deprecated
use_distributed_optimizer use_flash_attn use_legacy_static_engine use_megatron_fsdp
use_mp_args_from_checkpoint_args use_nsys_profiler use_one_sent_docs use_persistent_ckpt_worker
use_precision_aware_optimizer use_pytorch_profiler use_rotary_position_embeddings use_sharp
use_tokenizer_model_from_checkpoint_args use_torch_fsdp2 use_torch_optimizer_for_cpu_offload
use_tp_pp_dp_mapping valid_data_path vision_backbone_type vision_pretraining vision_pretraining_type
vocab_extra_ids vocab_file vocab_size wandb_entity wandb_exp_name wandb_project wandb_save_dir warmup
wd_incr_steps weight_decay weight_decay_incr_style world_size wsd_decay_steps yaml_cfg
"""

# harmless ones that describe the model: an export gives them back as they came
_CARRIED = """
max_position_embeddings seq_length init_method_std hidden_dropout attention_dropout
tokenizer_type vocab_size make_vocab_size_divisible_by apply_query_key_layer_scaling
attention_softmax_in_fp32 moe_router_bias_update_rate moe_router_load_balancing_type
moe_aux_loss_coeff moe_z_loss_coeff moe_router_dtype moe_token_dispatcher_type
"""

CARRIED = tuple(_CARRIED.split())
MAPPED = frozenset(_MAPPED.split()) | ALIASES.keys()
HARMLESS = frozenset(f"{_OF_LACKING} {_COMPUTING} {_TRAINING}".split())
