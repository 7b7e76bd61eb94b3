"""Runs the launches of Triton kernels on CPU tensors, in Triton's interpreter.

Kernels and launch code are the ones that run on a GPU: ``kernel[grid](*tensors)``, decorated with
``triton.jit`` whether ``TRITON_INTERPRET`` was set or not. The interpreter's arithmetic is repaired
where the installed Triton needs it: see ``patchpack._interpreter_arithmetic``.
"""

import ast
import contextlib
import dataclasses
import functools
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

_lock = threading.RLock()
_active = False


@contextlib.contextmanager
def interpreted(run: Callable[..., Any] | None = None) -> Iterator[None]:
    """Within this context, a kernel launched on CPU tensors runs in Triton's interpreter.

    One thread at a time is inside; others wait. Triton is left as it was found. While a launch
    runs, ``triton.language`` is the interpreter's, and no other thread may compile a kernel.

    Args:
        run: Called as ``run(kernel, grid, args, kwargs)`` in place of ``execute``, for the launches
            in this context and those inside it. Only the outermost context may have one.

    Raises:
        RuntimeError: ``run`` was given inside another context.
    """
    global _active
    with _lock:
        if _active:
            if run is not None:
                raise RuntimeError("run is for the outermost context, and one is active already")
            yield
            return
        with _redirected(run or execute):
            _active = True
            try:
                yield
            finally:
                _active = False


def execute(kernel: Any, grid: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Run one launch in the interpreter, program after program."""
    import numpy
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor(_rewrite(kernel.fn), kernel.arg_names, grid, kernel.pre_run_hooks)
    with numpy.errstate(all="ignore"):  # masked lanes compute on whatever they hold
        launch(*args, **kwargs)


@contextlib.contextmanager
def _redirected(run: Callable[..., Any]) -> Iterator[None]:
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    from patchpack._interpreter_arithmetic import repaired

    compiled_run, builder = JITFunction.run, interpreter.interpreter_builder
    patch_language, to_argument = interpreter._patch_lang, interpreter._implicit_cvt

    def launch(kernel, *args, grid, warmup, **kwargs):
        if isinstance(kernel, JITFunction) and _on_gpu(args, kwargs):
            return compiled_run(kernel, *args, grid=grid, warmup=warmup, **kwargs)
        return None if warmup else run(kernel, grid, args, kwargs)

    def call(function, *args, **kwargs):
        return _rewrite(function.fn)(*args, **kwargs)

    def argument(value):  # as on a GPU, where a float argument has single precision
        if isinstance(value, bool):
            return tl.tensor(builder.get_int1(value), tl.int1)
        if isinstance(value, float):
            return tl.tensor(builder.get_fp32(value), tl.float32)
        return to_argument(value)

    # The parts of the language a kernel sees are patched, once a launch: let that be all of it.
    sees_all = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})

    def language(_):
        scope = patch_language(sees_all)
        scope.set_attr(tl.tensor, "__index__", lambda self: self.handle.data.item())
        return scope

    with contextlib.ExitStack() as stack:
        for function in JITFunction, interpreter.InterpretedFunction:
            stack.enter_context(replaced(function, "run", launch))
            stack.enter_context(replaced(function, "__call__", call))
        stack.enter_context(replaced(interpreter, "_implicit_cvt", argument))
        stack.enter_context(replaced(interpreter, "_patch_lang", language))
        # Overflow is looked for, at a price, but reported only in the builder's debug mode.
        options = dataclasses.replace(builder.options, sanitize_overflow=False)
        stack.enter_context(replaced(builder, "options", options))
        stack.enter_context(repaired())
        yield


def _on_gpu(args: tuple, kwargs: dict[str, Any]) -> bool:
    tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
    return any(x.device.type != "cpu" for x in tensors)


@functools.cache
def _rewrite(function: Callable[..., Any]) -> Callable[..., Any]:
    """The Python function that the interpreter runs, made once for a kernel or device function."""
    from triton.runtime import interpreter

    class Rewriter(interpreter.FunctionRewriter):
        # The interpreter would add its own names to the globals of the kernel's module for good;
        # here they are the arguments of a function around the kernel.
        def _compile_and_exec(self, tree):
            names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            names = names & vars(interpreter).keys() - function.__globals__.keys()
            module = ast.parse(f"def bind({', '.join(names)}): return {function.__name__}")
            cast(ast.FunctionDef, module.body[0]).body.insert(0, tree.body[0])
            namespace = {}
            exec(compile(module, self.filename, "exec"), function.__globals__, namespace)
            return namespace["bind"](**{name: getattr(interpreter, name) for name in names})

    return Rewriter(function).rewrite_ast()


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` within this context."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
