"""Compile all kernels for a GPU of the given capability. No tests."""

import re
import subprocess
import sys
from tempfile import NamedTemporaryFile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megalith.layers import attend_kernels, columns, norm_fused
from megalith.layers.attend_fused import backward_blocks, forward_blocks, queries_blocks
from megalith.optim import compact, compact_fused

POINTERS = {
    "q": "", "k": "", "v": "", "o": "", "grad_o": "", "grad_q": "", "grad_k": "", "grad_v": "",
    "grad_y": "", "x": "", "grad_x": "", "joined": "", "beside": "",
    "weight": "fp32", "mean": "fp32", "inverse": "fp32",
    "sums": "fp32", "largest": "fp32", "products": "fp32", "rows": "i32", "words": "i32", "visible": "u8",
}  # fmt: skip
KERNELS = {
    attend_kernels.attend_forward: forward_blocks,
    attend_kernels.attend_row_products: queries_blocks,
    attend_kernels.attend_backward_keys: backward_blocks,
    attend_kernels.attend_backward_queries: queries_blocks,
}

COLUMN_KERNELS: dict[Any, dict[str, Any]] = {
    columns._gelu_backward: {
        "TANH": True,
        "STRETCH": columns.STRETCH,
        "ROWS": columns.GELU_ROWS,
        "COLUMNS": columns.COLUMNS,
    },
    columns._look_at: {"STRETCH": columns.STRETCH, "ROWS": columns.ROWS, "COLUMNS": columns.COLUMNS},
    columns._join_heads: {"WIDTH": 64, "PADDED": 64, "STRETCH": columns.STRETCH, "ROWS": 2 * columns.ROWS},
}


def signature_of(kernel: Any, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    kinds = {}
    for name in kernel.arg_names:
        if name in constants:
            kinds[name] = "constexpr"
        elif name in POINTERS:
            kinds[name] = f"*{POINTERS[name] or dtype}"
        else:
            kinds[name] = "fp32" if name in ("scale", "kept_scale") else "i32"
    return kinds


def main(capability: int, dtypes: list[str]) -> None:
    target = GPUTarget("cuda", capability, 32)
    for kernel, sizes in KERNELS.items():
        for dtype in dtypes:
            for width, masked in ((64, False), (128, True)):
                blocks = sizes(width)
                constants = {
                    "WIDTH": width, "PADDED": width, "CAUSAL": True, "MASKED": masked,
                    "PRECISION": "ieee" if dtype == "fp32" else "tf32",
                    "BLOCK_T": blocks.queries, "BLOCK_S": blocks.keys,
                }  # fmt: skip
                constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
                source = ASTSource(kernel, signature_of(kernel, dtype, constants), constants)
                options = {"num_warps": blocks.warps, "num_stages": blocks.stages, "maxnreg": blocks.registers}
                made = triton.compile(source, target=target, options=options)
                assert made.asm["cubin"]
                print(f"{kernel.__name__} {dtype} {width} shared {made.metadata.shared} bytes")
    for kernel, constants in COLUMN_KERNELS.items():
        for dtype in dtypes:
            made = triton.compile(ASTSource(kernel, signature_of(kernel, dtype, constants), constants), target=target)
            assert made.asm["cubin"]
            print(f"{kernel.__name__} {dtype} shared {made.metadata.shared} bytes")
    for dtype in dtypes:
        for width, centered in ((1600, True), (8192, False)):
            constants = {"CENTERED": centered, "PADDED": triton.next_power_of_2(width)}
            signature = signature_of(norm_fused._norm_backward, dtype, constants)
            # As it is compiled where it runs: rows begin at multiples of 16 bytes.
            aligned = [number for number, kind in enumerate(signature.values()) if kind != "constexpr"]
            known = {(number,): [["tt.divisibility", 16]] for number in aligned}
            source = ASTSource(norm_fused._norm_backward, signature, constants, known)
            made = triton.compile(source, target=target, options={"num_warps": norm_fused.warps_for(width)})
            told = f"{width} registers {registers_of(made.asm['cubin'])}"
            print(f"{norm_fused._norm_backward.__name__} {dtype} {told} shared {made.metadata.shared} bytes")
    for codes in (("i8", "u8"), ("bf16", "bf16")):
        made = triton.compile(ASTSource(compact_fused._update, *of_update(*codes)), target=target)
        assert made.asm["cubin"]
        print(f"{compact_fused._update.__name__} {codes[0]} shared {made.metadata.shared} bytes")


def registers_of(cubin: bytes) -> int:
    """How many a thread takes."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+)", told)
    assert found is not None, told
    return int(found[1])


def of_update(codes1: str, codes2: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Types and constants of the update of moments that are kept in these."""
    constants = {"IN_BF16": codes1 == "bf16", "ROWS": compact_fused.ROWS, "WIDTH": compact.BLOCK}
    kinds = {"weights": "*fp32", "gradient": "*fp32", "hashes": "*i32", "count": "i32", "word1": "i32", "word2": "i32"}
    kinds |= {"codes1": f"*{codes1}", "codes2": f"*{codes2}"}
    kinds["scales1"], kinds["scales2"] = ("*bf16", "*bf16") if codes1 == "bf16" else ("*fp32", "*fp32")
    names = compact_fused._update.arg_names
    return {name: "constexpr" if name in constants else kinds.get(name, "fp32") for name in names}, constants


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
