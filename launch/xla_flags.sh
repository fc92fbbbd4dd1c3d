# Flags of the compiler and environment of the devices, by hardware; launchers source this:
#   source launch/xla_flags.sh v5p [SLICES]      v4 v5e v5p v6e h100 h200 b200 cpu auto
# What you set yourself in XLA_FLAGS or LIBTPU_INIT_ARGS comes last and wins.
# Flags that only repeat a default are left out; launch/README.md says which those are.
# shellcheck shell=bash
_hardware="$1" _slices="${2:-1}" _tpu=() _gpu=()

if [ "$_hardware" = auto ]; then
  case "$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)" in
    *B200*) _hardware=b200 ;;
    *H200*) _hardware=h200 ;;
    ?*) _hardware=h100 ;; # flags for any other GPU are the same
    *) _hardware=cpu ;;
  esac
fi

case "$_hardware" in
  v4 | v5e | v5p | v6e)
    # Gathers of weights run beside the computation: on by default on v5 and v6, not here.
    [ "$_hardware" != v4 ] || _tpu+=(--xla_enable_async_all_gather=true)
    if [ "$_slices" -gt 1 ]; then
      # Gradients cross the slow network while other gradients are still computed ...
      _tpu+=(--xla_tpu_enable_data_parallel_all_reduce_opt=true)
      # ... also where they differ in size from one layer to the next.
      _tpu+=(--xla_tpu_data_parallel_opt_different_sized_ops=true)
    fi
    ;;
  h100 | h200 | b200)
    # Collectives run beside the computation instead of before it.
    _gpu+=(--xla_gpu_enable_latency_hiding_scheduler=true)
    # In the scan over layers: the next layer's weights are gathered during this one ...
    _gpu+=(--xla_gpu_enable_pipelined_all_gather=true)
    # ... and the last layer's gradients are reduced during this one.
    _gpu+=(--xla_gpu_enable_pipelined_reduce_scatter=true)
    _gpu+=(--xla_gpu_enable_pipelined_all_reduce=true)
    # Two iterations of a loop as one: what was gathered need not be copied in between.
    _gpu+=(--xla_gpu_enable_while_loop_double_buffering=true)
    # JAX takes three quarters of the memory by default; the rest would lie idle.
    export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
    ;;
  cpu) ;; # of the flags tried none gained anything
  *)
    echo "flaxlm: hardware '$_hardware': needed v4 v5e v5p v6e h100 h200 b200 cpu or auto" >&2
    exit 2
    ;;
esac

if [ "${#_tpu[@]}" -gt 0 ]; then # in XLA_FLAGS, jaxlib would refuse them
  export LIBTPU_INIT_ARGS="${_tpu[*]}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
fi
if [ "${#_gpu[@]}" -gt 0 ]; then
  export XLA_FLAGS="${_gpu[*]}${XLA_FLAGS:+ $XLA_FLAGS}"
fi
unset _hardware _slices _tpu _gpu
