from dataclasses import dataclass
from torch import Tensor
@dataclass(frozen=True)
class Profile:
    keys: Tensor
    queries: Tensor
    model: str
