"""Each patch of aligner.backend.patches, and that upstream still needs it: when one of these fails, delete the patch.

Upstream is looked at in a process without the patches; they are applied here as soon as the package is imported.
"""

import subprocess
import sys

import pytest
import torch
from launching import TIME_LIMIT

from aligner.backend import patches

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for machines without CUDA")

UNPATCHED = {
    "restricted reading": """
import io, os, pickle
from types import SimpleNamespace
from torch.distributed.checkpoint import FileSystemReader
reader = FileSystemReader.__new__(FileSystemReader)
class Run:
    def __reduce__(self): return (print, ("needed",))
reader._get_metadata_path = lambda rank=None: ""
reader.fs = SimpleNamespace(create_stream=lambda *_: io.BytesIO(pickle.dumps(Run())))
try: reader.read_metadata()
except AttributeError: pass  # None has no storage_meta
""",
    "writer": """
import inspect, megatron.core.dist_checkpointing.strategies.filesystem_async as f
print("needed" if "ctx.Manager().Queue()" in inspect.getsource(f._get_write_results_queue) else "")
""",
    "notebook": """
import sys
sys.ps1 = ">>> "
from nemo import lightning as nl
try: nl.Trainer(accelerator="cpu", devices=1, strategy=nl.MegatronStrategy())
except Exception as e: print("needed" if "interactive" in str(e) else e)
""",
    "router": """
import megatron.core.transformer.moe.moe_utils as m
print("" if hasattr(m, "te_general_gemm") else "needed")
""",
    "dispatcher": """
import torch
from megatron.core.transformer.moe.token_dispatcher import maybe_move_tensor_to_cpu as move
print("needed" if torch.is_tensor(move(torch.ones(2), as_numpy=True)) else "")
""",
    "CUDA as CPU": """
import torch
try: torch.zeros(1, device="cuda")
except (AssertionError, RuntimeError): print("needed")
""",
    "random states": """
import torch, megatron.core.tensor_parallel.random as r
state = torch.get_rng_state()
torch.rand(1)
r._set_cuda_rng_state(state)  # put off until CUDA is there, that is for ever
if not torch.equal(torch.get_rng_state(), state): print("needed")
""",
    "seeding": """
import nemo.lightning.megatron_init as m
from megatron.core import tensor_parallel
m.get_pipeline_model_parallel_rank = lambda: 0
m._set_random_seed(1)
if not tensor_parallel.get_cuda_rng_tracker().get_states(): print("needed")
""",
    "loading": """
import torch
from nemo.lightning.io.pl import _fix_tensors_device
try: _fix_tensors_device({"x": torch.zeros(1, device="meta")} and {"x": torch.zeros(1)})
except (AssertionError, RuntimeError): print("needed")
""",
    "fusions": """
from nemo.collections import llm
try: llm.LlamaConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
except ValueError as e: print("needed" if "apply_rope_fusion" in str(e) else e)
""",
    "connectors": """
import inspect
from nemo.collections.llm.gpt.model.llama import HFLlamaImporter
source = inspect.getsource(HFLlamaImporter.convert_state)
print("needed" if "self_attention.linear_qkv.layer_norm_weight" in source else "")
""",
    "tied embeddings": """
import inspect
from nemo.collections.llm.gpt.model.qwen2 import HFQwen2Importer
source = inspect.getsource(HFQwen2Importer.convert_state)
print("needed" if "output_layer.weight" in source and "tie" not in source else "")
""",
    "norms": """
from types import SimpleNamespace
from megatron.core.transformer.torch_norm import WrappedTorchNorm
try: WrappedTorchNorm(SimpleNamespace(layernorm_zero_centered_gamma=True), 8)
except AssertionError: print("needed")
""",
    "adapters": """
import nemo.collections.llm.peft.utils as u
print("needed" if u.HAVE_TE else "")
""",
}


@pytest.fixture(scope="module")
def unpatched() -> dict[str, str]:
    """What each snippet prints; one process for all, since importing NeMo takes ten seconds."""
    lines = ["import contextlib, io"]
    for name, code in UNPATCHED.items():
        lines.append(f"out = io.StringIO()\nwith contextlib.redirect_stdout(out):\n    try: exec({code!r}, {{}})")
        lines.append("    except Exception as error: print(type(error).__name__, error)")
        lines.append(f"print('RESULT', {name!r}, '|', out.getvalue().strip().splitlines()[-1:] or '')")
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 0, done.stderr
    found = [
        line.removeprefix("RESULT ").split(" | ") for line in done.stdout.splitlines() if line.startswith("RESULT")
    ]
    return dict(found)


def test_there_is_a_look_at_upstream_for_every_patch() -> None:
    assert len(UNPATCHED) == len(patches.PATCHES)


@pytest.mark.parametrize("name", UNPATCHED)
def test_upstream_still_needs_the_patch(unpatched: dict[str, str], name: str) -> None:
    assert unpatched[name] == "['needed']"


def test_requests_for_cuda_are_answered_on_the_cpu() -> None:
    patches.apply()
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.ones(2).cuda().device.type == "cpu"
    assert torch.ones(2).to("cuda").device.type == "cpu"
    assert torch.tensor(1, pin_memory=True).to("cuda", non_blocking=True) == 1
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.cuda.current_device() == patches.CPU


def test_configs_come_without_what_needs_transformer_engine() -> None:
    patches.apply()
    from nemo.collections import llm

    config = llm.LlamaConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    assert not any(getattr(config, name) for name in patches.FUSIONS)
    assert config.use_cpu_initialization


def test_fused_norms_are_found_under_their_local_names() -> None:
    assert (
        patches._local_name("decoder.layers.*.mlp.linear_fc1.layer_norm_weight")
        == "decoder.layers.*.pre_mlp_layernorm.weight"
    )
    assert patches._local_name("model.layers.*.input_layernorm.weight") == "model.layers.*.input_layernorm.weight"


def test_installing_twice_changes_nothing_more() -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    patches.apply()
    once = TransformerConfig.__post_init__
    patches.apply()
    assert TransformerConfig.__post_init__ is once
