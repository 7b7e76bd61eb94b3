"""Faults that threads, copies, workers, bad input or drawn batches bring to light."""

from faults import Fault

FAULTS = [
    Fault(
        "reliability: an encoder holds a function without a name",
        "python/patchpack/models/native_vit.py",
        '"quick_gelu": _quick_gelu,',
        '"quick_gelu": lambda x: _quick_gelu(x),',
        "tests/test_reliability.py -k copies_are_equal",
    ),
    Fault(
        "reliability: positions of a grid are kept before they are made",
        "python/patchpack/packing/_grid.py",
        "            with _keepable():\n                position_ids = self._make_position_ids()\n"
        '            object.__setattr__(self, "_position_ids", position_ids)',
        "            with _keepable():\n"
        "                position_ids = torch.empty(self.num_tokens, 2)\n"
        '                object.__setattr__(self, "_position_ids", position_ids)\n'
        "                position_ids.copy_(self._make_position_ids())",
        "tests/test_reliability.py -k keeps_no_half",
    ),
    Fault(
        "reliability: the interpreter stays active when a launch fails",
        "python/patchpack/_interpreter.py",
        "            try:\n                yield\n"
        "            finally:\n                _active = False",
        "            yield\n            _active = False",
        "tests/test_reliability.py -k allocation_that_fails-and-rope-and-triton",
    ),
    Fault(
        "reliability: one thread's interpreter is left for another's",
        "python/patchpack/_interpreter.py",
        "    with _lock:\n        if _active:",
        "    _lock.acquire()\n    with contextlib.nullcontext():\n        if _active:",
        "tests/test_reliability.py -k allocation_that_fails-and-rope-and-triton",
    ),
    Fault(
        "reliability: eager code turns the heads of a buffer one after the other",
        "python/patchpack/ops/_in_place.py",
        "    q.copy_(turned[0])\n    k.copy_(turned[1])",
        "    q.copy_(turned[0])\n    k.copy_(turned[1].clone())",
        "tests/test_reliability.py -k all_is_written_or_nothing",
    ),
    Fault(
        "reliability: a copied layout forgets what it was built from",
        "python/patchpack/layout.py",
        "    def _set(self, **fields) -> None:",
        "    def __getstate__(self):\n"
        '        return {**vars(self), "parts": ()}\n\n'
        "    def __setstate__(self, state):\n        self._set(**state)\n\n"
        "    def _set(self, **fields) -> None:",
        "tests/test_reliability.py -k copies_are_equal",
    ),
    Fault(
        "reliability: workers and this process number the frames differently",
        "python/patchpack/packing/_grid.py",
        '            ("_sizes", sizes),\n            ("_position_ids", None),',
        '            ("_sizes", sizes),\n'
        '            ("_position_ids", geometry.new_empty(num_tokens, 2)),',
        "tests/test_reliability.py -k workers_make",
    ),
    Fault(
        "bad input: the options of a rotation within attention are not looked at",
        "python/patchpack/ops/varlen_attention.py",
        '    check_options("rope_", **options)\n',
        "",
        "tests/test_bad_input.py -k refused-and-varlen_attention",
    ),
    Fault(
        "bad input: a size of blocks is not looked at",
        "python/patchpack/packing/_grid.py",
        '        size = _merge_size(size, "size")\n',
        "",
        "tests/test_bad_input.py -k refused-and-num_blocks",
    ),
    Fault(
        "bad input: a buffer is written before its rotation is checked",
        "python/patchpack/ops/rope_2d.py",
        "    _in_place.check(impl, qkv, num_heads)\n",
        "    _in_place.check(impl, qkv, num_heads)\n    qkv.neg_()\n",
        "tests/test_bad_input.py -k refused-and-rope_2d_",
    ),
    Fault(
        "bad input: an option without a case",
        "python/patchpack/ops/rope.py",
        "    interleaved: bool = False,\n    impl: str | None = None,\n) -> tuple[Tensor, Tensor]:",
        "    interleaved: bool = False,\n    scale: float = 1.0,\n    impl: str | None = None,\n"
        ") -> tuple[Tensor, Tensor]:",
        "tests/test_bad_input.py -k every_argument",
    ),
    Fault(
        "fuzz: rows of positions that lie apart are taken for neighbours",
        "python/patchpack/ops/mrope.py",
        "        q, k, position_ids, sections, mrope_interleaved, float(base), False\n",
        "        q, k, position_ids.as_strided(position_ids.shape, (position_ids.shape[1], 1)),\n"
        "        sections, mrope_interleaved, float(base), False\n",
        "tests/test_fuzz.py -k every_layout-and-mrope",
    ),
    Fault(
        "fuzz: a base that is not the default is forgotten",
        "python/patchpack/ops/mrope.py",
        "position_ids, sections, mrope_interleaved, float(base), False\n",
        "position_ids, sections, mrope_interleaved, 1e6, False\n",
        "tests/test_fuzz.py -k a_few_draws-and-mrope-and-native",
    ),
    Fault(
        "fuzz: window index of torch and of C++ differ past the last row",
        "python/patchpack/metadata.py",
        "    height = (rows - side * band).clamp(max=side)\n    window,",
        "    height = rows.clamp(max=side)\n    window,",
        "tests/test_fuzz.py -k a_few_draws-and-grids",
    ),
]
