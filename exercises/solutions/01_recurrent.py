from attention import linear_attention_recurrent

__all__ = ["linear_attention_recurrent"]
