# Compiler flags and environment variables by hardware; the launchers source this:
#   source launch/xla_flags.sh v5p [SLICES]      v4 v5e v5p v6e h100 h200 b200 cpu auto
# What you set in XLA_FLAGS or LIBTPU_INIT_ARGS comes last and wins.
# Flags that only repeat a default are left out; launch/README.md lists them.
# shellcheck shell=bash
_hardware="$1" _slices="${2:-1}" _tpu=() _gpu=()

if [ "$_hardware" = auto ]; then
  case "$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)" in
    *B200*) _hardware=b200 ;;
    *H200*) _hardware=h200 ;;
    ?*) _hardware=h100 ;; # any other GPU gets the same flags
    *) _hardware=cpu ;;
  esac
fi

case "$_hardware" in
  v4 | v5e | v5p | v6e)
    # Overlap weight gathers with computation: the default on v5 and v6, not on v4.
    [ "$_hardware" != v4 ] || _tpu+=(--xla_enable_async_all_gather=true)
    if [ "$_slices" -gt 1 ]; then
      # Send gradients over the slow network while others are still being computed ...
      _tpu+=(--xla_tpu_enable_data_parallel_all_reduce_opt=true)
      # ... also when their sizes differ from layer to layer.
      _tpu+=(--xla_tpu_data_parallel_opt_different_sized_ops=true)
    fi
    ;;
  h100 | h200 | b200)
    # Overlap collectives with computation.
    _gpu+=(--xla_gpu_enable_latency_hiding_scheduler=true)
    # In the scan over layers, gather the next layer's weights during this layer ...
    _gpu+=(--xla_gpu_enable_pipelined_all_gather=true)
    # ... and reduce the previous layer's gradients during this one.
    _gpu+=(--xla_gpu_enable_pipelined_reduce_scatter=true)
    _gpu+=(--xla_gpu_enable_pipelined_all_reduce=true)
    # Unroll loops by two, so that gathered weights need no copy between iterations.
    _gpu+=(--xla_gpu_enable_while_loop_double_buffering=true)
    # By default JAX takes three quarters of the memory and leaves the rest idle.
    export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
    ;;
  cpu) ;; # none of the flags tried helped
  *)
    echo "flaxlm: hardware '$_hardware': needed v4 v5e v5p v6e h100 h200 b200 cpu or auto" >&2
    exit 2
    ;;
esac

if [ "${#_tpu[@]}" -gt 0 ]; then # jaxlib would refuse them in XLA_FLAGS
  export LIBTPU_INIT_ARGS="${_tpu[*]}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
fi
if [ "${#_gpu[@]}" -gt 0 ]; then
  export XLA_FLAGS="${_gpu[*]}${XLA_FLAGS:+ $XLA_FLAGS}"
fi
unset _hardware _slices _tpu _gpu
