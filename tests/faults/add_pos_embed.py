"""Faults of ``add_pos_embed``."""

from faults import Fault, contract

FAULTS = [
    Fault(
        "add_pos_embed: rows and columns of the table swapped",
        "kernels/add_pos_embed.py",
        "        table.shape[0],\n        table.shape[1],\n",
        "        table.shape[1],\n        table.shape[0],\n",
        contract("add_pos_embed"),
    ),
    Fault(
        "add_pos_embed: order of the tokens ignored in the gradient",
        "kernels/add_pos_embed.py",
        "cell_to_token(out_y, out_x, out_cols, MERGE)",
        "cell_to_token(out_y, out_x, out_cols, 1)",
        contract("add_pos_embed"),
    ),
    Fault(
        "add_pos_embed: the gradient takes the first frame of a chunk only",
        "kernels/add_pos_embed.py",
        "range(chunk // grid_chunks, num_frames, frame_chunks)",
        "range(chunk // grid_chunks, tl.minimum(num_frames, frame_chunks), frame_chunks)",
        contract("add_pos_embed"),
    ),
    Fault(
        "add_pos_embed: every chunk takes all frames",
        "kernels/add_pos_embed.py",
        "range(chunk // grid_chunks, num_frames, frame_chunks)",
        "range(0, num_frames)",
        contract("add_pos_embed"),
    ),
    Fault(
        "add_pos_embed: gradient not normalised",
        "kernels/add_pos_embed.py",
        "weight *= scale",
        "weight *= 1.0",
        contract("add_pos_embed"),
    ),
    Fault(
        "add_pos_embed: digits lost in long sums",
        "kernels/add_pos_embed.py",
        "frame_acc -= lost",
        "frame_acc -= 0.0 * lost",
        "tests/test_add_pos_embed.py -k lose_digits",
    ),
    Fault(
        "add_pos_embed: what lies past a border is left out of the gradient",
        "kernels/add_pos_embed.py",
        "borders_y = (row == 0) | (row == rows - 1)",
        "borders_y = row == 0",
        contract("add_pos_embed"),
    ),
    Fault(
        "native add_pos_embed: past the caches, though rows are no cache lines",
        "csrc/past_caches.h",
        "return aligned && ",
        "return ",
        "tests/test_add_pos_embed.py -k more_than_caches_hold",
    ),
    Fault(
        "native add_pos_embed: what a sum over frames loses is forgotten",
        "csrc/add_pos_embed.h",
        "lost = (after - sum) - term;",
        "lost = Floats{};",
        "tests/test_add_pos_embed.py -k many_frames",
    ),
]
