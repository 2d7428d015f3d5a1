"""Of the kernels' own Python."""

from tests.mutation.mutant import Mutant

_PACKED = "tests/numerics/test_packed_linear.py::"

MUTANTS = (
    Mutant(
        "the one call reads keys by the values' scales",
        "kernels/colm_kernels/decode_step.py",
        "self._scales = (k_scales_LBPK, v_scales_LBPK)",
        "self._scales = (v_scales_LBPK, v_scales_LBPK)",
        "tests/numerics/test_decode_step.py::test_one_call_gives_the_bits_of_the_models_own_modules",
    ),
    Mutant(
        "the library weights values by the keys' scales",
        "kernels/colm_kernels/decode_attention.py",
        "v_scales=None if v_scales_BPK is None else v_scales_BPK.data_ptr(),",
        "v_scales=None if k_scales_BPK is None else k_scales_BPK.data_ptr(),",
        "tests/numerics/test_decode_attention.py::test_every_head_dim_matches",
    ),
    Mutant(
        "the one call's biases are the first chain's",
        "kernels/colm_kernels/decode_step.py",
        "else _address(biases[chain])\n",
        "else _address(biases[0])\n",
        "tests/numerics/test_decode_step.py::test_one_call_gives_the_bits_of_the_models_own_modules",
    ),
    Mutant(
        "the one call takes any number of tokens",
        "kernels/colm_kernels/few_rows_linear.py",
        'return variant if num_rows <= MAX_ROWS or is_in_pairs else "torch"',
        "return variant",
        "tests/numerics/test_decode_step.py::test_how_many_tokens_one_call_takes_is_what_linear_takes",
    ),
    Mutant(
        "a panel's words are of one output after the other",
        "kernels/colm_kernels/panels.py",
        "panels.copy_(whole.view(num_panels, outputs, num_words, elements).transpose(1, 2))",
        "panels.copy_(whole.view(num_panels, num_words, outputs, elements))",
        "tests/numerics/test_panels.py::test_a_panel_has_a_word_of_each_output_side_by_side",
    ),
    Mutant(
        "weights on the grid of a file's blocks are fitted anew",
        "kernels/colm_kernels/quantised.py",
        "(fitted[3] < best[3]) & ~is_on_grid_OG",
        "fitted[3] < best[3]",
        "tests/numerics/test_quantised_weights.py::test_what_was_dequantised_from_a_gguf_block_gives_that_block_again",
    ),
    Mutant(
        "a scale of quantised weights is a little too large",
        "kernels/colm_kernels/quantised.py",
        "weight_OGN.abs().amax(dim=2) / _INT8_LARGEST",
        "weight_OGN.abs().amax(dim=2) / 126",
        "tests/numerics/test_quantised_weights.py::test_what_was_dequantised_from_a_gguf_block_gives_that_block_again",
    ),
    Mutant(
        "the library takes panels for rows",
        "kernels/colm_kernels/few_rows_linear.py",
        "chain_in, chain_out, format_of(weight), 0)",
        "chain_in, chain_out, 0, 0)",
        "tests/numerics/test_panels.py::test_chains_serve_their_rows_and_leave_zeros_to_the_others",
    ),
    Mutant(
        "the library's products take the place of AMX",
        "kernels/colm_kernels/packed_linear.py",
        "if forced is None and torch.cpu.get_capabilities()",
        "if False and torch.cpu.get_capabilities()",
        _PACKED + "test_amx_is_left_to_pytorch",
    ),
    Mutant(
        "bf16 goes where no variant has its products",
        "kernels/colm_kernels/packed_linear.py",
        'return variant if variant in ("avx2", "avx512_bf16") else None',
        'return "avx512_bf16"',
        _PACKED + "test_a_machine_without_fast_products_of_pairs_takes_what_it_has",
    ),
    Mutant(
        "gate and up serve different rows",
        "kernels/colm_kernels/chain_linear.py",
        " or tuple(gate_rows) != tuple(up_rows)",
        "",
        _PACKED + "test_gate_and_up_that_differ_are_refused_by_name",
    ),
    Mutant(
        "a row of odd width begins inside a word",
        "kernels/colm_kernels/packed_linear.py",
        " or x_RI.stride(0) % 2",
        "",
        _PACKED + "test_x_whose_rows_begin_inside_a_word_is_left_to_pytorch",
    ),
    Mutant(
        "a prefill's one call reads the next layer's weights",
        "kernels/colm_kernels/prefill_layer.py",
        "index * _MATRIX_BYTES",
        "0 * _MATRIX_BYTES",
        "tests/numerics/test_prefill_layer.py::test_one_call_gives_the_bits_of_the_models_own_modules",
    ),
    Mutant(
        "a prefill's one call cannot be stopped",
        "kernels/colm_kernels/prefill_layer.py",
        "0 if tile.cancelled is None else tile.cancelled.address",
        "0",
        "tests/numerics/test_prefill_layer.py::test_a_flag_that_is_set_ends_the_call",
    ),
)
