"""Faults of ``patchpack.integrations.transformers``, but for its image processor."""

from faults import Fault

HERE = "python/patchpack/integrations/transformers"
TESTS = "tests/test_transformers.py"

FAULTS = [
    Fault(
        "transformers: padding sees the tokens after it",
        f"{HERE}/_attention.py",
        "keys = torch.stack([row, row, begin, end, end], dim=1)",
        "keys = torch.stack([row, begin, begin, end, end], dim=1)",
        f"{TESTS} -k model_s and internvl and left and float32",
    ),
    Fault(
        "transformers: a window of text is one key too wide",
        f"{HERE}/_attention.py",
        "sliding_window is None else sliding_window - 1",
        "sliding_window is None else sliding_window",
        f"{TESTS} -k model_s and tied and right and float32",
    ),
    Fault(
        "transformers: positions that restart are not seen",
        f"{HERE}/_attention.py",
        "position_ids.diff(dim=1) != 1",
        "position_ids.diff(dim=1) > 1",
        f"{TESTS} -k restart",
    ),
    Fault(
        "transformers: frames of a video count in what follows it",
        f"{HERE}/_text.py",
        "frames_advance=False,",
        "frames_advance=True,",
        f"{TESTS} -k positions_of_the_model",
    ),
    Fault(
        "transformers: windows at the right edge as wide as others",
        f"{HERE}/_vision.py",
        "width = (cols[image] - side * place).clamp(max=side)",
        "width = (cols[image] - 0 * place).clamp(max=side)",
        f"{TESTS} -k grids_of_their_own",
    ),
    Fault(
        "transformers: whole frames are turned by windows",
        f"{HERE}/_vision.py",
        "if i in tower.fullatt_block_indexes]",
        "if i not in tower.fullatt_block_indexes]",
        f"{TESTS} -k model_s and qwen2_5_vl-windows-right and float32",
    ),
    Fault(
        "transformers: a sample is asked for its first token",
        f"{HERE}/_collate.py",
        "            labels[:1] = ignore_index\n",
        "            labels[:0] = ignore_index\n",
        f"{TESTS} -k packed_batch_is",
    ),
    Fault(
        "transformers: deepstack is not added",
        f"{HERE}/_merge.py",
        "return hidden_states + torch.zeros_like",
        "return hidden_states + 0 * torch.zeros_like",
        f"{TESTS} -k model_s and deepstack and packed and float32",
    ),
    Fault(
        "transformers: videos stand where images do",
        f"{HERE}/_merge.py",
        "torch.empty_like(tokens).index_copy(0, place, tokens)",
        "tokens + 0 * place[:, None]",
        f"{TESTS} -k model_s and deepstack and packed and float32",
    ),
    Fault(
        "transformers: undo leaves methods behind",
        f"{HERE}/_report.py",
        "                vars(edit.owner).pop(edit.name, None)\n",
        "                pass\n",
        f"{TESTS} -k undo",
    ),
    Fault(
        "transformers: a length of windows is compiled",
        f"{HERE}/_vision.py",
        "(spec.windows[0] // spec.windows[1]) ** 2",
        "windows.max_seqlen",
        f"{TESTS} -k loader_has and qwen2_5_vl and grid",
    ),
    Fault(
        "transformers: padding of crops is rounded as LLaVA's own code does",
        f"{HERE}/_tiles.py",
        "padding = (rows - int(round(height * (cols / width), 7))) // 2",
        "padding = (rows - int(height * (cols / width)) + 1) // 2",
        f"{TESTS} -k crops_are",
    ),
    Fault(
        "transformers: a compiled encoder does not know how many patches it has",
        f"{HERE}/_vision.py",
        "torch._check(grid.num_tokens == hidden_states.shape[0])",
        "pass",
        f"{TESTS} -k compiled_twice and qwen2_5_vl",
    ),
    Fault(
        "transformers: patches of other images are taken",
        f"{HERE}/_vision.py",
        "    elif grid.num_tokens != hidden_states.shape[0]:",
        "    elif False:",
        f"{TESTS} -k patches_are_refused",
    ),
    Fault(
        "metadata: lengths that are traced are compared",
        "python/patchpack/metadata.py",
        " or torch.compiler.is_compiling():\n        return length",
        ":\n        return length",
        f"{TESTS} -k compiled_twice and qwen2_5_vl",
    ),
]
