"""The custom operators of target `onnx`: model-local functions of domain `adaras`, specified in docs/onnx-ops.md.

A runtime that knows nothing of them runs their bodies; one that has kernels of these names may run those instead.

B sequences, S tokens of this call, A columns of the attention mask, P columns of the KV cache before this call,
F gate features, H gate width, C = KV heads * head size, D model width.
"""

import onnx

DOMAIN = "adaras"
VERSION = 1

# x (B, S, D), scale (B, S, 1) float, vector (D,) float -> (B, S, D) in the type of x
_ADAPTIVE_STEER = """
<domain: "adaras", opset_import: ["" : 23]>
AdaptiveSteer (x, scale, vector) => (y)
{
    change = Mul (scale, vector)
    change_x = CastLike (change, x)
    y = Add (x, change_x)
}
"""

# input_ids (B, S), attention_mask (B, A), last_prompt_token () float: 1 or 0
# -> tokens (B, S, 1) float: 1 at the tokens to steer; prompt () bool; first () bool
# No If, though it would save 3 us a call: see ReasoningGate.
_STEERED_TOKENS = """
<domain: "adaras", opset_import: ["" : 23]>
SteeredTokens (input_ids, attention_mask, last_prompt_token) => (tokens, prompt, first)
{
    one = Constant <value_ints = [1]> ()
    length = Shape <start = 1, end = 2> (input_ids)
    counts = ReduceSum <keepdims = 0> (attention_mask, one)
    longest = ReduceMax <keepdims = 1> (counts)
    is_first = LessOrEqual (longest, length)
    has_several = Greater (length, one)
    is_prompt = Or (is_first, has_several)
    first = Squeeze (is_first)
    prompt = Squeeze (is_prompt)
    begin = Neg (length)
    end = Constant <value_ints = [9223372036854775807]> ()
    valid = Slice (attention_mask, begin, end, one)
    step = Constant <value_int = 1> ()
    columns = Squeeze (length)
    limit = Add (columns, step)
    column = Range (step, limit, step)
    place = Mul (valid, column)
    furthest = ReduceMax <keepdims = 1> (place, one)
    last = Max (furthest, one)
    at_last = Equal (place, last)
    at_last_float = Cast <to = 1> (at_last)
    of_prompt = Mul (at_last_float, last_prompt_token)
    every_token = Constant <value_float = 1.0> ()
    chosen = Where (prompt, of_prompt, every_token)
    axis = Constant <value_ints = [2]> ()
    tokens = Unsqueeze (chosen, axis)
}
"""

# past_key (B, KV heads, P, head size), first () bool -> decision (B, 1, 1) float: 1 where the row is steered
_PAST_DECISION = """
<domain: "adaras", opset_import: ["" : 23]>
PastDecision (past_key, first) => (decision)
{
    begin = Constant <value_ints = [0, 0, 0]> ()
    end = Constant <value_ints = [1, 1, 1]> ()
    axes = Constant <value_ints = [1, 2, 3]> ()
    slot = Slice (past_key, begin, end, axes)
    axis = Constant <value_ints = [2]> ()
    found = ReduceSum <keepdims = 0> (slot, axis)
    found_float = Cast <to = 1> (found)
    zero = Constant <value_float = 0.0> ()
    decision = Where (first, zero, found_float)
}
"""

# features (B, S, F), attention_mask (B, A), past_key and past_value (B, KV heads, P, head size), prompt () bool,
# first () bool, attention_weight (F, 1), hidden_weight (F, H), hidden_bias (H,), output_weight (H, 1); scalars:
# attention_bias, output_bias, threshold
# -> decision (B, 1, 1) float, present_key and present_value (B, KV heads, max(P, A), head size)
# The If gives nothing but outputs of the graph: OpenVINO 2026.4 reads garbage from any other (seen on its CPU).
_REASONING_GATE = """
<domain: "adaras", opset_import: ["" : 23]>
ReasoningGate (features, attention_mask, past_key, past_value, prompt, first, attention_weight, attention_bias,
               hidden_weight, hidden_bias, output_weight, output_bias, threshold)
    => (decision, present_key, present_value)
{
    present_key, present_value = If (prompt) <
        then_branch = judge () => (key_then, value_then) {
            zero = Constant <value_float = 0.0> ()
            i0 = Constant <value_ints = [0]> ()
            i1 = Constant <value_ints = [1]> ()
            i2 = Constant <value_ints = [2]> ()
            length = Shape <start = 1, end = 2> (features)
            begin = Neg (length)
            end = Constant <value_ints = [9223372036854775807]> ()
            mask = Slice (attention_mask, begin, end, i1)
            is_valid_2 = Cast <to = 9> (mask)
            is_valid = Unsqueeze (is_valid_2, i2)
            features_float = Cast <to = 1> (features)
            x = Where (is_valid, features_float, zero)
            score_linear = MatMul (x, attention_weight)
            score_biased = Add (score_linear, attention_bias)
            score = Tanh (score_biased)
            weight_any = Exp (score)
            weight = Where (is_valid, weight_any, zero)
            pre = MatMul (x, hidden_weight)
            pre_weighted = Mul (pre, weight)
            new_sum = ReduceSum <keepdims = 0> (pre_weighted, i1)
            new_weight = ReduceSum <keepdims = 0> (weight, i1)

            past_slot = Slice (past_value, i0, i1, i2)
            past_row = ReduceSum <keepdims = 0> (past_slot, i2)
            rows_left = Constant <value_ints = [0, -1]> ()
            past_flat = Reshape (past_row, rows_left)
            past_float = Cast <to = 1> (past_flat)
            past_seen = Where (first, zero, past_float)
            width = Shape (hidden_bias)
            used = Add (width, i2)
            old_weight_small = Slice (past_seen, i1, i2, i1)
            many = Constant <value_float = 1024.0> ()
            old_weight = Mul (old_weight_small, many)
            old_mean = Slice (past_seen, i2, used, i1)
            old_sum = Mul (old_mean, old_weight)

            all_weight = Add (old_weight, new_weight)
            all_sum = Add (old_sum, new_sum)
            mean = Div (all_sum, all_weight)
            hidden_linear = Add (mean, hidden_bias)
            hidden = Relu (hidden_linear)
            output_linear = MatMul (hidden, output_weight)
            output = Add (output_linear, output_bias)
            probability = Sigmoid (output)

            below = Less (probability, threshold)

            batch = Shape <start = 0, end = 1> (features)
            heads = Shape <start = 1, end = 2> (past_value)
            size = Shape <start = 3, end = 4> (past_value)
            channels = Mul (heads, size)
            free = Sub (channels, used)
            pads = Concat <axis = 0> (i0, i0, i0, free)
            all_weight_small = Div (all_weight, many)
            seen = Concat <axis = 1> (probability, all_weight_small, mean)
            seen_padded = Pad (seen, pads)
            slot_shape = Concat <axis = 0> (batch, heads, i1, size)
            seen_slot = Reshape (seen_padded, slot_shape)
            value_slot = CastLike (seen_slot, past_value)

            before = Shape <start = 2, end = 3> (past_value)
            after = Shape <start = 1, end = 2> (attention_mask)
            columns = Max (before, after)
            present_shape = Concat <axis = 0> (batch, heads, columns, size)
            value_then = Expand (value_slot, present_shape)
            i23 = Constant <value_ints = [2, 3]> ()
            below_4 = Unsqueeze (below, i23)
            key_slot = CastLike (below_4, past_key)
            key_then = Expand (key_slot, present_shape)
        },
        else_branch = remember () => (key_else, value_else) {
            before = Shape <start = 2, end = 3> (past_key)
            after = Shape <start = 1, end = 2> (attention_mask)
            has_room_1 = GreaterOrEqual (before, after)
            has_room = Squeeze (has_room_1)
            key_else, value_else = If (has_room) <
                then_branch = stay () => (key_same, value_same) {
                    key_same = Identity (past_key)
                    value_same = Identity (past_value)
                },
                else_branch = grow () => (key_grown, value_grown) {
                    i0 = Constant <value_ints = [0]> ()
                    i1 = Constant <value_ints = [1]> ()
                    i2 = Constant <value_ints = [2]> ()
                    present_shape = Concat <axis = 0> (i1, i1, after, i1)
                    key_slot = Slice (past_key, i0, i1, i2)
                    key_grown = Expand (key_slot, present_shape)
                    value_slot = Slice (past_value, i0, i1, i2)
                    value_grown = Expand (value_slot, present_shape)
                }
            >
        }
    >
    origin = Constant <value_ints = [0, 0, 0]> ()
    one = Constant <value_ints = [1, 1, 1]> ()
    axes = Constant <value_ints = [1, 2, 3]> ()
    slot = Slice (present_key, origin, one, axes)
    last_axis = Constant <value_ints = [3]> ()
    slot_3 = Squeeze (slot, last_axis)
    decision = Cast <to = 1> (slot_3)
}
"""


def functions() -> dict[str, onnx.FunctionProto]:
    """Every function of the domain, by name."""
    texts = (_ADAPTIVE_STEER, _STEERED_TOKENS, _PAST_DECISION, _REASONING_GATE)
    parsed = [onnx.parser.parse_function(text) for text in texts]
    return {function.name: function for function in parsed}
