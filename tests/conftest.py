"""One thread for torch in this process: workers of one run share the cores, and sums keep their order."""

import torch

torch.set_num_threads(1)
