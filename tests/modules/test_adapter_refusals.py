"""Adapter files that must be refused: the file and problem are named, the model is untouched."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch
from adapter_models import Net, adapted_net, assert_unchanged, net_input, state
from torch import nn

import lora_kernels as lk
from lora_kernels.errors import AdapterFileError, InvalidArgumentError
from lora_kernels.modules.safetensors_file import read_file, write

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


@pytest.fixture
def saved(tmp_path):
    """(plain net, folder with a good adapter of inp, up and down, and of head saved whole)."""
    base, model = adapted_net(targets=["inp", "up", "down"], modules_to_save=["head"])
    lk.save_adapter(model, tmp_path)
    return base, tmp_path


def edit_config(folder, **changes):
    content = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))


def edit_tensors(folder, change):
    tensors, metadata = read_file(folder / WEIGHTS)
    change(tensors)
    with open(folder / WEIGHTS, "wb") as file:
        write(file, tensors, metadata)


def assert_refused(base, folder, problem, error=AdapterFileError, **options):
    """By a plain model and by one that has LoRALinear layers already."""
    present = copy.deepcopy(base)
    lk.replace_modules(present, r=4, targets=["inp", "up", "down"], **options)
    for model in (copy.deepcopy(base), present):
        before = state(model)
        with pytest.raises(error, match=problem) as caught:
            lk.load_adapter(model, folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"peft_type": "absent"}, "'peft_type' is missing"),
        ({"peft_type": None}, "peft_type=None"),
        ({"r": "absent"}, "'r' is missing"),
        ({"r": 0}, "r=0"),
        ({"r": 4.0}, "r=4.0"),
        ({"r": "4"}, "r='4'"),
        ({"r": True}, "r=True"),
        ({"r": 5}, "has rank 4, adapter_config.json says 5"),
        ({"lora_alpha": "absent"}, "'lora_alpha' is missing"),
        ({"lora_alpha": float("nan")}, "alpha=nan"),
        ({"lora_alpha": float("inf")}, "alpha=inf"),
        ({"lora_alpha": 0}, "alpha=0"),
        ({"lora_alpha": [8]}, r"alpha=\[8\]"),
        ({"lora_dropout": 1.5}, "dropout=1.5"),
        ({"lora_dropout": None}, "dropout=None"),
        ({"use_rslora": "yes"}, "use_rslora='yes'"),
        ({"use_dora": 1}, "use_dora=1"),
        ({"use_dora": True}, "no lora_magnitude_vector"),
        ({"rank_pattern": {"up": 3}}, "has rank 4, adapter_config.json says 3"),
        ({"rank_pattern": {"up": 0}}, "r=0"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"rank_pattern": {"(up": 4}}, "not a regular expression"),
        ({"alpha_pattern": {"up": float("nan")}}, "alpha=nan"),
        ({"target_modules": 7}, "target_modules=7"),
        ({"target_modules": ["up", 7]}, "target_modules"),
        ({"target_modules": "(up"}, "not a regular expression"),
        ({"target_modules": ["up", "inp"]}, "does not target"),
        ({"target_modules": ["up", "down", "inp", "head"], "modules_to_save": None},
         "nothing for layer 'head'|neither an adapter's"),
        ({"exclude_modules": ["inp"]}, "does not target"),
        ({"modules_to_save": None}, "'head.bias' is neither"),
        ({"modules_to_save": ["head", "norm"]}, "no 'layers.0.norm.weight'"),
        ({"modules_to_save": "(head"}, "not a regular expression"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform"),
        ({"layers_to_transform": [0], "layers_pattern": ["layers"]}, "does not target"),
        ({"task_type": 3}, "task_type=3"),
    ],
    ids=str,
)  # fmt: skip
def test_configuration_with_a_bad_value(changes, problem, saved):
    base, folder = saved
    edit_config(folder, **changes)
    assert_refused(base, folder, problem)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("layer_replication", [[0, 1], [0, 1]]),
        ("alora_invocation_tokens", [1, 2]),
        ("target_parameters", ["experts.weight"]),
        ("trainable_token_indices", [0]),
        ("trainable_token_indices", {"embed": [0]}),
        ("ensure_weight_tying", True),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 1}),
        ("kasa_config", {}),
        ("velora_config", {}),
        ("monteclora_config", {}),
        ("megatron_config", {}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "OLoRA"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "mica"),
        ("init_lora_weights", "unheard-of"),
        ("init_lora_weights", [1]),
    ],
)
def test_features_that_change_the_arithmetic_are_refused(key, value, saved):
    base, folder = saved
    edit_config(folder, **{key: value})
    assert_refused(base, folder, key)


def test_every_variant_of_peft_is_refused_or_known_to_be_plain():
    """A PEFT release with a new variant key must be looked at, not loaded as plain LoRA."""
    peft = pytest.importorskip("peft")
    variants = {
        name
        for name, field in peft.LoraConfig.__dataclass_fields__.items()
        if field.metadata.get("is_lora_variant")
    }
    from lora_kernels.modules.adapter_config import _OFF

    assert variants - {"use_dora"} <= set(_OFF)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_initialisations_that_leave_the_base_alone_are_fine(init, saved):
    base, folder = saved
    edit_config(folder, init_lora_weights=init)
    lk.load_adapter(base, folder)
    assert isinstance(base.inp, lk.LoRALinear)


def test_unknown_keys_and_unset_features_are_ignored(saved):
    base, folder = saved
    twin = copy.deepcopy(base)
    lk.load_adapter(twin, folder)
    edit_config(
        folder, brand_new_option={"deep": [1]}, revision="main", peft_version="99.0",
        runtime_config=None, loftq_config={}, use_bdlora=None, layer_replication=None,
        trainable_token_indices=None, lora_bias=False, use_dora=None, target_modules=None,
    )  # fmt: skip
    lk.load_adapter(base, folder)
    x = net_input()
    assert torch.equal(base(x), twin(x))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"r": ' + b"9" * 20_000 + b"}", "not valid JSON"),
        (b"[1]", "a JSON list"),
        (b"null", "a JSON NoneType"),
    ],
    ids=["empty", "cut", "not text", "deep", "long integer", "list", "null"],
)
def test_configuration_that_is_not_an_object(text, problem, saved):
    base, folder = saved
    (folder / CONFIG).write_bytes(text)
    assert_refused(base, folder, problem)


def up(kind):
    return f"{PREFIX}layers.0.up.{kind}"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.clear(), "no lora_A"),
        (lambda t: t.pop(up("lora_A.weight")), "'layers.0.up' has no lora_A"),
        (lambda t: t.pop(up("lora_B.weight")), "'layers.0.up' has no lora_B"),
        (lambda t: (t.pop(up("lora_A.weight")), t.pop(up("lora_B.weight"))),
         "nothing for"),
        (lambda t: t.update({"layers.0.up.lora_A.weight": torch.zeros(4, 24)}),
         "does not start with"),
        (lambda t: t.update({PREFIX + "nowhere.lora_A.weight": torch.zeros(4, 24),
                             PREFIX + "nowhere.lora_B.weight": torch.zeros(40, 4)}),
         "no layer 'nowhere'"),
        (lambda t: t.update({PREFIX + "layers.0.norm.lora_A.weight": torch.zeros(4, 40),
                             PREFIX + "layers.0.norm.lora_B.weight": torch.zeros(40, 4)}),
         "does not target"),
        (lambda t: t.update({PREFIX + "embed.lora_embedding_A": torch.zeros(4, 40)}),
         "layer 'embed' has no lora_embedding_B"),
        (lambda t: t.update({up("lora_B.bias"): torch.zeros(40)}), "is not supported"),
        (lambda t: t.update({up("lora_diag"): torch.zeros(4)}), "is not supported"),
        (lambda t: t.update({up("lora_A.weight"): torch.zeros(4, 25)}), "maps 25 to 40"),
        (lambda t: t.update({up("lora_B.weight"): torch.zeros(41, 4)}), "maps 24 to 41"),
        (lambda t: t.update({up("lora_B.weight"): torch.zeros(40, 3)}), "accepted"),
        (lambda t: t.update({up("lora_A.weight"): torch.zeros(4, 24, 1)}), "accepted"),
        (lambda t: t.update({up("lora_A.weight"): torch.zeros(0, 24),
                             up("lora_B.weight"): torch.zeros(40, 0)}), "accepted"),
        (lambda t: t.update({up("lora_A.weight"): torch.zeros(4, 24).int()}), "int32"),
        (lambda t: t.update({up("lora_A.weight"): torch.zeros(4, 24).to(torch.float8_e4m3fn)}),
         "float8"),
        (lambda t: t[up("lora_B.weight")][3].fill_(float("nan")), "NaN"),
        (lambda t: t[up("lora_B.weight")][3].fill_(float("inf")), "infinity"),
        (lambda t: t.update({up("lora_magnitude_vector"): torch.ones(40)}),
         "has a lora_magnitude_vector"),
        (lambda t: t.pop(PREFIX + "head.bias"), "no 'head.bias'"),
        (lambda t: t.update({PREFIX + "head.bias": torch.zeros(6)}), r"has shape \[6\]"),
        (lambda t: t.update({PREFIX + "head.bias": torch.zeros(5).int()}), "int32"),
        (lambda t: t.update({PREFIX + "head.extra": torch.zeros(5)}), "'head.extra' is neither"),
        (lambda t: t.update({PREFIX + "inp.bias": torch.zeros(24)}), "'inp.bias' is neither"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(change, problem, saved):
    base, folder = saved
    edit_tensors(folder, change)
    assert_refused(base, folder, problem)


def test_truncation_of_either_file_at_many_places(saved):
    base, folder = saved
    model = copy.deepcopy(base)
    before = state(model)
    for name in (CONFIG, WEIGHTS):
        good = (folder / name).read_bytes()
        for size in {0, 1, 7, 8, 9, *range(0, len(good), len(good) // 60), len(good) - 1}:
            (folder / name).write_bytes(good[:size])
            with pytest.raises(AdapterFileError, match=name):
                lk.load_adapter(model, folder)
        (folder / name).write_bytes(good)
    assert_unchanged(model, before)
    lk.load_adapter(model, folder)


def test_corrupted_configurations_load_or_are_refused(saved):
    base, folder = saved
    rng = random.Random(0)
    good = (folder / CONFIG).read_bytes()
    outcomes = {True: 0, False: 0}
    for _ in range(150):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 3))):
            data[rng.randrange(len(data))] = rng.choice(b'{}[]",:0123456789 aeltrfnu.()*\x00\xff')
        (folder / CONFIG).write_bytes(bytes(data))
        model = copy.deepcopy(base)
        before = state(model)
        try:
            lk.load_adapter(model, folder)
            outcomes[True] += 1
        except AdapterFileError:
            outcomes[False] += 1
            assert_unchanged(model, before)
    assert min(outcomes.values()) > 10


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(name, saved):
    base, folder = saved
    (folder / name).unlink()
    assert_refused(base, folder, f"{name}: cannot be read")


def test_a_missing_folder_and_a_pickle(saved):
    base, folder = saved
    assert_refused(base, folder / "absent", "cannot be read")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert_refused(base, folder, "pickle")


def test_an_adapter_for_another_model(saved):
    _, folder = saved
    for model, problem in (
        (Net(width=32), "is for another model"),
        (nn.Sequential(nn.Linear(3, 3)), "no layer 'inp'"),
        (nn.Linear(3, 3), "no layer 'inp'"),
    ):
        before = state(model)
        with pytest.raises(AdapterFileError, match=problem):
            lk.load_adapter(model, folder)
        assert_unchanged(model, before)
    with pytest.raises(InvalidArgumentError, match="is a str"):
        lk.load_adapter("model", folder)


def test_layers_that_cannot_carry_the_adapter(saved):
    base, folder = saved

    class Special(nn.Linear):
        pass

    model = copy.deepcopy(base)
    model.inp = Special(16, 24)
    before = state(model)
    with pytest.raises(AdapterFileError, match=r"'inp' of the model cannot carry .*Special"):
        lk.load_adapter(model, folder)
    assert_unchanged(model, before)
    with pytest.raises(AdapterFileError, match="meta device"):
        lk.load_adapter(copy.deepcopy(base).to("meta"), folder)


@pytest.mark.parametrize("options", [{"r": 8}, {"dora": True}])
def test_existing_layers_of_another_kind(options, saved):
    base, folder = saved
    lk.replace_modules(base, **{"r": 4, "targets": ["inp", "up", "down"], **options})
    before = state(base)
    with pytest.raises(AdapterFileError, match="the model's LoRALinear has"):
        lk.load_adapter(base, folder)
    assert_unchanged(base, before)


def test_existing_layers_that_the_file_lacks(saved):
    base, folder = saved
    lk.replace_modules(base, r=4, targets=["inp", "up", "down", "head"])
    before = state(base)
    with pytest.raises(AdapterFileError, match="'head'"):
        lk.load_adapter(base, folder)
    assert_unchanged(base, before)


def test_saved_modules_that_the_model_ties(saved):
    base, folder = saved
    base.copy_of_head = nn.Linear(24, 5)
    base.copy_of_head.weight = base.head.weight
    before = state(base)
    # "copy_of_head" ends in "head", too: the file has to have it.
    with pytest.raises(AdapterFileError, match=r"no 'copy_of_head\."):
        lk.load_adapter(base, folder)
    del base.copy_of_head
    base.other = nn.Linear(24, 5)
    base.other.weight = base.head.weight
    before = state(base)
    with pytest.raises(AdapterFileError, match=r"'head\.weight' is tied to 'other\.weight'"):
        lk.load_adapter(base, folder)
    assert_unchanged(base, before)


def test_a_bad_dtype_argument(saved):
    base, folder = saved
    with pytest.raises(InvalidArgumentError, match="adapter_dtype"):
        lk.load_adapter(base, folder, adapter_dtype=torch.int8)
