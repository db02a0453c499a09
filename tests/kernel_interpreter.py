"""
Triton's interpreter keeps bfloat16 as uint16 bits and computes with the bits: tl.dot multiplies them, `a + b` adds them
casts truncate, and no error is raised (triton issue #11584). `install()` makes dot and casts right, as on a GPU, and
everything else loud.
"""
import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle


def to_float(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bits(x):
    """float32 -> bfloat16 bits, to nearest even; nan stays nan."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    bits = ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), bits).astype(np.uint16)


def install():
    plain_dot, plain_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    plain_binary, plain_unary = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op

    def widen(handle):
        return TensorHandle(to_float(handle.data), tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return plain_dot(self, widen(a), widen(b), d, input_precision, max_num_imprecise_acc)

    def cast_impl(self, src, dst_type):
        if dst_type.scalar != tl.bfloat16:
            return plain_cast(self, widen(src), dst_type)
        if src.dtype.scalar == tl.bfloat16:
            return src
        return TensorHandle(to_bits(np.asarray(src.data).astype(np.float32)), tl.bfloat16)

    def refuse(name, *handles):
        if any(h.dtype.scalar == tl.bfloat16 for h in handles):
            raise TypeError(f'bfloat16 in {name}: convert to float32, the interpreter computes with the bits')

    def binary_op(self, lhs, rhs, op):
        refuse('binary_op', lhs, rhs)
        return plain_binary(self, lhs, rhs, op)

    def unary_op(self, arg, op):
        refuse('unary_op', arg)
        return plain_unary(self, arg, op)

    plain_patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor, scope):                      # before triton 3.9: int() of one element, an error in numpy 2.5
        plain_patch(tensor, scope)
        scope.set_attr(tensor, '__index__', lambda x: int(x.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor
    # after a launch the interpreter copies every storage back to the device, here onto itself, gigabytes and all
    GridExecutor._restore_args_dev = lambda self, *args: None
    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
    InterpreterBuilder.binary_op, InterpreterBuilder.unary_op = binary_op, unary_op
