"""What passes move, against operators counted one by one; how many tensors a model has, against transformers."""

import pytest
import torch
from shapes import config_of, model_of, plain_linear, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhfdsl.planning import traffic
from rlhfdsl.planning.adapters import Lora, linears
from rlhfdsl.planning.catalog import lookup, shape
from rlhfdsl.planning.families import FAMILIES
from rlhfdsl.planning.memory import BYTES

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
FREE = {"aten::empty", "aten::empty_like", "aten::new_empty_strided", "aten::_unsafe_view"}


class Moved(TorchDispatchMode):
    """The bytes of the inputs and outputs of every operator but products, views and what only allocates.

    skinny: products of at most so many columns count too, which read and write more than they compute. A product
    gives zeros: no value is looked at, and a CPU without instructions for bf16 takes seconds for them.
    """

    def __init__(self, skinny=0):
        super().__init__()
        self.bytes, self.skinny = 0, skinny

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name
        if name in PRODUCTS:
            bare = operator(*tree_map_only(torch.Tensor, lambda x: x.to("meta"), args), **(kwargs or {}))
            out = torch.zeros_like(bare, device="cpu")
        else:
            out = operator(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        product = name in PRODUCTS and min(min(x.shape) for x in tensors) > self.skinny
        if not (operator.is_view or name in FREE or product):
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out


def counted(numbers, dtype, eager, lora=None, rows=2, length=64):
    """Bytes moved for each token of a forward pass and of its backward pass, products of adapters among them."""
    model = model_of(numbers, dtype, eager, lora)
    ids = torch.ones(rows, length, dtype=torch.long)
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    places = {} if numbers["type"] == "bloom" else {"position_ids": torch.arange(length).expand(rows, length)}
    skinny = lora["rank"] if lora else 0
    with plain_linear(), Moved(skinny) as forward:
        out = model.base_model(inputs_embeds=inputs, use_cache=False, **places).last_hidden_state
    gradient = torch.ones_like(out)
    with Moved(skinny) as backward:
        out.backward(gradient)
    return [mode.bytes / (rows * length) for mode in (forward, backward)]


def of_a_layer(numbers, dtype, eager, lora=None):
    two, three = (counted(numbers | {"layers": layers}, dtype, eager, lora) for layers in (2, 3))
    return three[0] - two[0], three[1] - two[1]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_a_layer_moves_what_its_operators_read_and_write(kind, dtype):
    """Within 10 % forwards; backwards near 2.1 times as much."""
    numbers = tiny(kind) | {"hidden": 256, "context": 128, "intermediate": 1024}
    numbers |= {"head_dim": 96} if "head_dim" in numbers else {}
    eager = not FAMILIES[kind].sdpa
    forward, backward = of_a_layer(numbers, dtype, eager)
    assert traffic.layer(shape(numbers), 64, dtype, eager, "cpu") == pytest.approx(forward, rel=0.1)
    assert traffic.BACKWARD * forward == pytest.approx(backward, rel=0.25)


def test_adapters_move_what_their_operators_read_and_write():
    """Beside every matrix of a frozen OPT layer, within 10 %: the difference to a layer without them."""
    numbers = tiny("opt") | {"hidden": 512, "context": 128, "intermediate": 2048}
    layers = linears(shape(numbers))
    lora = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": [layer.path for layer in layers], "lr": None}
    plain, adapted = of_a_layer(numbers, "bf16", False), of_a_layer(numbers, "bf16", False, lora)
    known = Lora(lora, layers, None)
    assert traffic.adapters(known, "bf16", backward=False) == pytest.approx(adapted[0] - plain[0], rel=0.1)
    # A frozen layer has no biases' gradients (a read for each output) and none of norms.
    frozen = BYTES["bf16"] * sum(layer.outputs for layer in layers)
    assert traffic.adapters(known, "bf16", backward=True) - frozen == pytest.approx(adapted[1] - plain[1], rel=0.1)


@pytest.mark.parametrize("numbers", [
    *(tiny(kind) for kind in ("llama", "qwen2", "qwen3", "gemma3_text", "phi3", "opt", "gpt2", "gpt_neox", "bloom")),
    lookup("facebook/opt-350m"),
], ids=lambda n: f"{n['type']}-{n['hidden']}")  # fmt: skip
def test_tensors_of_a_model(numbers):
    for scalar, auto in ((False, AutoModelForCausalLM), (True, AutoModelForSequenceClassification)):
        if scalar and numbers["type"] == "phi3":
            continue
        with torch.device("meta"):
            model = auto.from_config(config_of(numbers))
        assert traffic.tensors(shape(numbers), scalar) == len(list(model.parameters()))
