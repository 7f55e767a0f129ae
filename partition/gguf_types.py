"""The tensor types of GGUF: their blocks, which can be read, and what `encoding: as-is` keeps them as.

Dequantised they are floats (the gguf package knows how); as-is they stay in about their own size. Exact are

    Q4_0, Q4_1, TQ1_0, TQ2_0          -> int4-g32   one float16 scale (and minimum) over 32 columns or more
    Q5_0, Q8_0, IQ4_NL, MXFP4         -> int8-g32   codes of a byte or less times one scale of 32 columns
    Q4_K, IQ4_XS                      -> the same, but their scales are products, which float16 rounds

and the rest are encoded anew from their floats: types of four bits or less to int4-g32, of more to int8-g32.
docs/quantization.md has the measured loss of each.
"""

from __future__ import annotations

# id -> name, elements of a block, bytes of a block
TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
FLOAT_TYPES = frozenset({"F64", "F32", "F16", "BF16"})
AS_IS = {
    **dict.fromkeys(("Q4_0", "Q4_1", "Q4_K", "TQ1_0", "TQ2_0"), "int4-g32"),
    **dict.fromkeys(("Q2_K", "Q3_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), "int4-g32"),
    **dict.fromkeys(("Q5_0", "Q5_1", "Q8_0", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4"), "int8-g32"),
}
READABLE_TYPES = FLOAT_TYPES | AS_IS.keys()
