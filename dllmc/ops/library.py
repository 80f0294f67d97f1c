"""The one `torch.library` namespace, `dllmc`; every operator's file defines its schema and kernels in it.

Plain `define` and `impl`: `torch.library.custom_op` would load torch._inductor and torch._dynamo.
"""

from typing import Any

import torch

library: Any = torch.library.Library("dllmc", "DEF")
