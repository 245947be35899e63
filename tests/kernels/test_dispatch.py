"""Which path runs, and that a forced path that cannot run raises instead of falling back."""

import pytest
import torch
from semiperm.kernels import dispatch
from semiperm.kernels.dispatch import check_tensors, kernel_path, next_power_of_2
from semiperm.kernels.errors import KernelError

CPU = torch.zeros(1)


class OnGpu:
    """As much of a tensor on a GPU as kernel_path looks at."""

    is_cuda, device = True, "cuda:0"


def test_auto_takes_triton_on_a_gpu_and_else_the_reference(monkeypatch):
    monkeypatch.delenv("SEMIPERM_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "triton", object())
    assert kernel_path(CPU) == "reference" and kernel_path(OnGpu) == "triton"
    monkeypatch.setenv("SEMIPERM_KERNELS", "auto")
    assert kernel_path(CPU) == "reference" and kernel_path(OnGpu) == "triton"


def test_products_want_matrix_units(monkeypatch):
    """Turing and RDNA take torch for products, and Triton for what is elementwise."""
    monkeypatch.delenv("SEMIPERM_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "triton", object())
    for capability, path in (((7, 5), "reference"), ((8, 0), "triton"), ((12, 0), "triton")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, answer=capability: answer)
        assert kernel_path(OnGpu, products=True) == path and kernel_path(OnGpu) == "triton"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for chip, path in (("gfx942:sramecc+:xnack-", "triton"), ("gfx90a", "triton"), ("gfx1100", "reference")):
        about = type("Properties", (), {"gcnArchName": chip})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, answer=about: answer)
        assert kernel_path(OnGpu, products=True) == path and kernel_path(OnGpu) == "triton"
    assert kernel_path(CPU, products=True) == "reference"


def test_more_rows_than_a_grid_holds_take_torch(monkeypatch):
    monkeypatch.delenv("SEMIPERM_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "triton", object())
    assert [kernel_path(OnGpu, rows=rows) for rows in (65_535, 65_536)] == ["triton", "reference"]
    monkeypatch.setenv("SEMIPERM_KERNELS", "triton")
    with pytest.raises(KernelError, match="65536 rows were given where a grid holds 65535"):
        kernel_path(OnGpu, rows=65_536)


def test_the_reference_can_be_forced(reference_path):
    assert kernel_path(CPU) == kernel_path(OnGpu) == "reference"


def test_triton_can_be_forced(triton_path, device):
    assert kernel_path(torch.zeros(1, device=device)) == "triton"


def test_another_value_is_refused(monkeypatch):
    monkeypatch.setenv("SEMIPERM_KERNELS", "cuda")
    with pytest.raises(KernelError, match="SEMIPERM_KERNELS='cuda'; expected 'auto', 'triton' or 'reference'"):
        kernel_path(CPU)


def test_without_triton_auto_takes_the_reference_and_force_raises(monkeypatch):
    monkeypatch.setattr(dispatch, "triton", None)
    monkeypatch.delenv("SEMIPERM_KERNELS", raising=False)
    assert kernel_path(OnGpu) == "reference"
    monkeypatch.setenv("SEMIPERM_KERNELS", "triton")
    with pytest.raises(KernelError, match="Triton is not installed"):
        kernel_path(OnGpu)


KERNELS = (
    "gated_low_rank",
    "gated_projection",
    "keyed_correlation",
    "normalized_attention_guidance",
    "safe_guidance_step",
    "token_match_merge",
)
WITHOUT_TRITON = f"""
import sys
sys.modules["triton"] = None  # as if it were not installed
import importlib, torch
for name in {KERNELS}:
    importlib.import_module("semiperm.kernels." + name)
from semiperm.kernels.normalized_attention_guidance import normalized_attention_guidance
print(normalized_attention_guidance(torch.ones(1, 2, 3), torch.zeros(1, 2, 3), 4.0, 2.5, 0.25).sum().item())
"""
FORCED = """
import torch
from semiperm.kernels.dispatch import KernelError
from semiperm.kernels.normalized_attention_guidance import normalized_attention_guidance
try:
    normalized_attention_guidance(torch.ones(1, 2, 3), torch.zeros(1, 2, 3), 4.0, 2.5, 0.25)
except KernelError as error:
    print(error)
"""


def test_every_kernel_file_imports_and_runs_without_triton(python):
    assert python("-c", WITHOUT_TRITON).strip() == "8.25"  # 0.25 * 2.5 + 0.75 = 1.375 a value


def test_force_without_gpu_or_interpreter_raises(python):
    if dispatch.triton is None:
        pytest.skip("Triton is not installed")
    told = python("-c", FORCED, SEMIPERM_KERNELS="triton")
    assert "the tensor is on cpu; move it to a GPU, set TRITON_INTERPRET=1" in told


def test_next_power_of_2():
    assert [next_power_of_2(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]


def test_check_tensors():
    check_tensors("op", CPU, other=CPU, absent=None)
    with pytest.raises(KernelError, match="op: dtype torch.float64; expected float32, float16 or bfloat16"):
        check_tensors("op", CPU.double())
    with pytest.raises(KernelError, match="op: other is torch.float16 on cpu; expected torch.float32 on cpu"):
        check_tensors("op", CPU, other=CPU.half())
