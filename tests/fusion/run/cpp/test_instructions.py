from fusion.run.cpp.instructions import NEEDED, instruction_sets, this_machine


def test_a_cpu_gets_what_it_says_that_it_has_and_nothing_else():
    every = frozenset(feature for _, needed in NEEDED for feature in needed)
    names = [found.name for found in instruction_sets(every, "x86_64")]
    assert names == ["amx", "avx512", "avx2", "plain"]
    assert instruction_sets(every, "x86_64")[0].flags[:3] == ("-mamx-tile", "-mamx-bf16", "-mavx512bf16")
    assert [x.name for x in instruction_sets(every - {"amx_bf16"}, "x86_64")] == ["avx512", "avx2", "plain"]
    assert [x.name for x in instruction_sets(every - {"avx512vl"}, "x86_64")] == ["avx2", "plain"]
    assert [x.name for x in instruction_sets(every - {"fma"}, "x86_64")] == ["plain"]
    assert [x.name for x in instruction_sets(every, "aarch64")] == ["plain"]
    assert instruction_sets(frozenset(), "x86_64")[0].flags == ()


def test_this_machine_has_one_at_least():
    assert this_machine()[-1].name == "plain"
