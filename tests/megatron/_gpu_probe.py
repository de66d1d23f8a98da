import sys, os, logging; sys.path.insert(0,"tests/megatron")
import torch
logging.basicConfig(level=logging.INFO)
logging.getLogger("mbridge").setLevel(logging.DEBUG)
from small_models import *
import torch.distributed as dist
from mbridge.megatron import *
from mbridge.megatron.runtime import RUNTIME
from functools import partial
def batches(n, dev="cuda"):
    g = torch.Generator().manual_seed(7)
    for _ in range(n): yield torch.randint(0,VOCAB,(BATCH,LENGTH+1),generator=g).to(dev)
def forward_step(data, model):
    t = next(data); pos=torch.arange(LENGTH, device=t.device).expand(BATCH,LENGTH)
    mask=torch.triu(torch.ones(LENGTH,LENGTH,device=t.device),1).bool()[None,None]
    out = model(t[:,:-1].contiguous(), pos, mask, labels=t[:,1:].contiguous())
    return out, lambda o: (o.float().mean(), {"loss": o.float().mean().item()})
def one(cfg, dtype, tp=1, dist_opt=True, **kw):
    from megatron.core.optimizer import get_megatron_optimizer, OptimizerConfig
    from megatron.core.distributed import finalize_model_grads
    half = dtype is torch.bfloat16
    if tp > 1: init_parallel(tp=tp)
    chunks = build_chunks(cfg, dtype=dtype, bf16=half, wrap_with_ddp=True, ddp_config={"use_distributed_optimizer":dist_opt}, extra_transformer={"finalize_model_grads_func": finalize_model_grads}, **kw)
    devs = {str(l.tensor.device) for l in walk(chunks)}
    opt = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-2, bf16=half, params_dtype=dtype, use_distributed_optimizer=dist_opt, clip_grad=1.0), chunks)
    f = forward_backward_func(); L=[]
    for i in range(4):
        chunks[0].zero_grad_buffer(); opt.zero_grad()
        r = f(forward_step_func=forward_step, data_iterator=batches(4), model=chunks[0], num_microbatches=4, seq_length=LENGTH, micro_batch_size=BATCH, forward_only=False)
        L.append(round(sum(x["loss"] for x in r)/4,4)); opt.step()
    print(dist.get_rank(), dtype, devs, read_topology()[0], dist.get_backend(), [a.fix.name for a in RUNTIME._applied], L, flush=True)
    destroy_parallel()
if "WORLD_SIZE" in os.environ:
    one(small_qwen2(), torch.bfloat16, tp=2, dist_opt=False)
else:
    for name, cfg in (("qwen2", small_qwen2(tied=True)), ("moe", small_moe(variable_seq_lengths=False)), ("mla", small_mla(q_lora_rank=16))):
        for dtype in (torch.float32, torch.bfloat16):
            for cpu_init in (False, True):
                try:
                    extra = {"extra_transformer": {}} 
                    if name == "moe":
                        cfg.transformer["moe_grouped_gemm"] = False
                    one(cfg, dtype, use_cpu_initialization=cpu_init)
                except Exception as e:
                    import traceback; print("FAILED", name, dtype, cpu_init, type(e), str(e)[:500]); traceback.print_exc(limit=-3)
                    destroy_parallel()
