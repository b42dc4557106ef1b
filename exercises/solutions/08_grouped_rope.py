from model import apply_rope, rope_table


def grouped(attend, q, k, v):
    n = q.size(1) // k.size(1)
    return attend(q, k.repeat_interleave(n, 1), v.repeat_interleave(n, 1))


def rotate(x, offset=0):
    return apply_rope(x, rope_table(offset, offset + x.size(2), x.size(3)).to(x.dtype))


def relative():
    """The weights of softmax and Taylor are functions of q.k. The others depend on single coordinates."""
    return {"softmax": True, "elu": False, "relu": False, "taylor": True, "hedgehog": False}
