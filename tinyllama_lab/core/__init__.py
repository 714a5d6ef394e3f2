"""The worker half: loads a base once, then trains, evaluates and saves every trial of a pack."""

import logging

# without the optional package `kernels`, bitsandbytes warns as if an installation had failed
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "Failed to load CPU gemm_4bit_forward" not in record.msg
)
