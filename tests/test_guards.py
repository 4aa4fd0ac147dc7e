import random

import numpy as np
import pytest
import torch

# Each would be the library's own call if it stood in a module of `influence`.
FORBIDDEN = {
    "forward hook": "torch.nn.Linear(1, 1).register_forward_hook(print)",
    "forward pre-hook": "torch.nn.Linear(1, 1).register_forward_pre_hook(print)",
    "backward hook": "torch.nn.Linear(1, 1).register_full_backward_hook(print)",
    "state-dict hook": "torch.nn.Linear(1, 1).register_state_dict_post_hook(print)",
    "hook on every module": "torch.nn.modules.module.register_module_forward_hook(print)",
    "tensor hook": "torch.ones(1, requires_grad=True).register_hook(print)",
    "gradient hook": "torch.ones(1, requires_grad=True).register_post_accumulate_grad_hook(print)",
    "hook through torch": "torch.autograd.graph.register_multi_grad_hook([torch.ones(1, requires_grad=True)], print)",
    "torch seed": "torch.manual_seed(0)",
    "torch random seed": "torch.seed()",
    "cuda seed": "torch.cuda.manual_seed_all(0)",
    "torch state": "torch.set_rng_state(torch.get_rng_state())",
    "forked state": "torch.random.fork_rng()",
    "python seed": "random.seed(0)",
    "numpy seed": "np.random.seed(0)",
    "default dtype": "torch.set_default_dtype(torch.float32)",
    "default device": "torch.set_default_device('cpu')",
}


def call_from(module: str, statement: str) -> None:
    exec(statement, {"__name__": module, "torch": torch, "random": random, "np": np})


@pytest.mark.parametrize("statement", FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_library_call_is_refused(statement):
    with pytest.raises(AssertionError, match="`influence` called"):
        call_from("influence.fake", statement)


def test_call_through_torch_is_refused():
    # torch.cuda.manual_seed_all is torch's; the one who asked for it is still the library.
    through_torch = {"__name__": "torch.fake", "torch": torch}
    exec("def helper(): torch.manual_seed(0)", through_torch)
    with pytest.raises(AssertionError, match=r"torch(\.random)?\.manual_seed"):
        exec("helper()", {"__name__": "influence", "helper": through_torch["helper"]})


@pytest.mark.parametrize("module", ["transformers.fake", "influence_of_others", "tests.fake"])
def test_others_may_call(module):
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    call_from(module, "torch.set_rng_state(torch.get_rng_state()); random.setstate(random.getstate())")
    call_from(module, "torch.nn.Linear(1, 1).register_forward_hook(print)")
    torch.set_rng_state(torch_state)
    random.setstate(python_state)


def test_own_generators_are_free():
    statement = "torch.Generator().manual_seed(0); random.Random(0); np.random.default_rng(0)"
    call_from("influence.fake", statement)


@pytest.mark.compile
def test_compiling_is_free_of_false_alarms():
    namespace = {"__name__": "influence.fake", "torch": torch}
    exec('def step(x): return torch.compile(lambda y: y.sin() * 2, fullgraph=True, backend="aot_eager")(x)', namespace)
    x = torch.ones(3)
    torch.testing.assert_close(namespace["step"](x), x.sin() * 2)
