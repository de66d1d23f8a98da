# Defaults of the environment for running on this machine; what is already set wins. Sourced by the two scripts, read by tests/conftest.py.
: "${OMP_NUM_THREADS:=1}"           # several processes share the cores: ranks, engine workers, the driver
: "${HF_HUB_OFFLINE:=1}"            # examples and tests make their own checkpoints
: "${VLLM_CPU_KVCACHE_SPACE:=1}"    # GiB; vLLM's own default takes half of the memory
: "${VLLM_NO_USAGE_STATS:=1}"
: "${VLLM_LOGGING_LEVEL:=WARNING}"
: "${RAY_USAGE_STATS_ENABLED:=0}"
: "${TOKENIZERS_PARALLELISM:=false}"
export OMP_NUM_THREADS HF_HUB_OFFLINE VLLM_CPU_KVCACHE_SPACE VLLM_NO_USAGE_STATS VLLM_LOGGING_LEVEL RAY_USAGE_STATS_ENABLED TOKENIZERS_PARALLELISM
