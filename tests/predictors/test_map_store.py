import pytest
import torch
from torch import Tensor

from predictors.map_store import UNKNOWN_TOKEN, Keys, MapStore

L, E, S = 5, 6, 4


def random_maps(num: int, seed: int = 0) -> Tensor:
    """Rounded as the store rounds, so that a reference computes with the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num, L, E, generator=generator).half().float()


def random_keys(num: int, seed: int = 0) -> Keys:
    generator = torch.Generator().manual_seed(seed + 1000)
    prompts_TS = torch.randn(num, S, generator=generator)
    return Keys(prompts_TS, torch.randint(0, 3, (num,), generator=generator))


def laid_end_to_end(keys: Keys, token_weight: float) -> Tensor:
    """One vector a key: a one-hot token and the prompt, each in its share."""
    tokens_TV = torch.eye(3)[keys.token_ids_T] * token_weight**0.5
    prompts_TS = torch.nn.functional.normalize(keys.prompts_TS, dim=1) * (1 - token_weight) ** 0.5
    return torch.cat([tokens_TV, prompts_TS], dim=1)


def cosines(one_TX: Tensor, other_NX: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(one_TX[:, None], other_NX[None], dim=2)


def full_store(num: int = 20, **options: float) -> MapStore:
    store = MapStore(capacity=num, num_layers=L, num_experts=E, dim=S, **options)  # type: ignore[arg-type]
    store.add(random_maps(num), random_keys(num))
    return store


@pytest.mark.parametrize("token_weight", [0.0, 0.3, 1.0])
def test_semantic_search_is_brute_force_cosine_of_both_parts(token_weight: float) -> None:
    store, queries = full_store(token_weight=token_weight), random_keys(7, seed=1)
    expected_TN = cosines(
        laid_end_to_end(queries, token_weight), laid_end_to_end(random_keys(20), token_weight)
    )
    assert torch.allclose(store.semantic_scores_TN(queries), expected_TN, atol=1e-6)
    match = store.semantic_search(queries)
    assert torch.allclose(match.scores_T, expected_TN.amax(dim=1), atol=1e-6)
    found_T = expected_TN.gather(1, match.records_TM)[:, 0]
    assert torch.allclose(found_T, expected_TN.amax(dim=1), atol=1e-6)


def test_a_part_of_the_key_that_is_not_known_drops_out_of_the_score() -> None:
    store, known = full_store(token_weight=0.3), random_keys(7, seed=1)
    without_token = Keys(known.prompts_TS, torch.full((7,), UNKNOWN_TOKEN))
    without_prompt = Keys(torch.zeros(1, S), known.token_ids_T)
    stored = random_keys(20)
    prompt_TN = cosines(known.prompts_TS, stored.prompts_TS)
    same_TN = (known.token_ids_T[:, None] == stored.token_ids_T).float()
    assert torch.allclose(store.semantic_scores_TN(without_token), prompt_TN, atol=1e-6)
    assert torch.equal(store.semantic_scores_TN(without_prompt), same_TN)
    assert not store.semantic_scores_TN(Keys.unknown(2, S)).any()


def test_prefix_search_is_brute_force_cosine_of_the_flattened_prefix_at_every_layer() -> None:
    store, queries_TLE = full_store(), random_maps(3, seed=1)
    search = store.begin(3)
    for layer in range(L):
        search.extend(queries_TLE[:, layer])
        prefix = slice(0, layer + 1)
        expected_TN = cosines(
            queries_TLE[:, prefix].flatten(1), random_maps(20)[:, prefix].flatten(1)
        )
        assert torch.allclose(search.scores_TN(), expected_TN, atol=1e-5)
        match = search.search()
        assert torch.allclose(match.scores_T, expected_TN.amax(dim=1), atol=1e-5)
        rows_LTE = store.rows_LTE(match, slice(None))
        assert torch.equal(rows_LTE, random_maps(20)[match.records_TM[:, 0]].transpose(0, 1))


def test_a_search_under_way_sees_records_that_were_added_and_overwritten() -> None:
    """Another request may finish a token between two layers of this one."""
    store = MapStore(capacity=12, num_layers=L, num_experts=E, dim=S)
    store.add(random_maps(8), random_keys(8))
    queries_TLE = random_maps(2, seed=1)
    search = store.begin(2)
    for layer in range(L):
        search.extend(queries_TLE[:, layer])
        store.add(random_maps(3, seed=10 + layer), random_keys(3, seed=10 + layer))
        prefix = slice(0, layer + 1)
        stored_NLE = store.maps_LNE.transpose(0, 1).float()
        expected_TN = cosines(queries_TLE[:, prefix].flatten(1), stored_NLE[:, prefix].flatten(1))
        assert torch.allclose(search.scores_TN(), expected_TN, atol=1e-5)
    assert len(store) == 12


def test_several_neighbours_are_the_nearest_ones_weighed_by_their_cosines() -> None:
    store, queries = full_store(), random_keys(4, seed=1)
    scores_TN = store.semantic_scores_TN(queries)
    match = store.semantic_search(queries, num_neighbours=3)
    assert torch.equal(match.records_TM, scores_TN.topk(3, dim=1).indices)
    assert torch.allclose(match.weights_TM.sum(dim=1), torch.ones(4))
    assert (match.weights_TM.diff(dim=1) <= 0).all()
    maps_TMLE = random_maps(20)[match.records_TM]
    expected_LTE = (match.weights_TM[:, :, None, None] * maps_TMLE).sum(1).transpose(0, 1)
    assert torch.allclose(store.rows_LTE(match, slice(None)), expected_LTE, atol=1e-6)
    assert len(store.semantic_search(queries, num_neighbours=99).records_TM[0]) == 20


def redundancy(store: MapStore, map_LE: Tensor, key: Keys, semantic_share: float) -> Tensor:
    """RDY [N] by brute force."""
    semantic_N = cosines(laid_end_to_end(key, 0.5), laid_end_to_end(store.keys, 0.5))[0]
    whole_NX = store.maps_LNE.transpose(0, 1).float().flatten(1)
    trajectory_N = cosines(map_LE.flatten()[None], whole_NX)[0]
    return semantic_share * semantic_N + (1 - semantic_share) * trajectory_N


@pytest.mark.parametrize("prefetch_distance", [1, 4])
def test_a_full_store_replaces_the_most_redundant_record_one_by_one(prefetch_distance: int) -> None:
    """More new ones than are scored at once, and than there are places: each is the next's past."""
    num_new = 300
    together, alone = (full_store(prefetch_distance=prefetch_distance) for _ in range(2))
    maps_TLE, keys = random_maps(num_new, seed=1), random_keys(num_new, seed=1)
    records_T = together.add(maps_TLE, keys)
    for t in range(num_new):
        key = Keys(keys.prompts_TS[t, None], keys.token_ids_T[t, None])
        expected_N = redundancy(alone, maps_TLE[t], key, prefetch_distance / L)
        alone.add(maps_TLE[t, None], key)
        assert expected_N[records_T[t]] == pytest.approx(float(expected_N.max()), abs=1e-5)
    assert all(
        torch.equal(tensor, alone.tensors()[name]) for name, tensor in together.tensors().items()
    )


def test_a_duplicate_replaces_its_twin_and_the_size_stays() -> None:
    store, twin = full_store(), 13
    keys = random_keys(20)
    twin_key = Keys(keys.prompts_TS[twin, None], keys.token_ids_T[twin, None])
    assert store.add(random_maps(20)[twin, None], twin_key).tolist() == [twin]
    assert len(store) == 20
    assert torch.equal(store.maps_LNE.transpose(0, 1).float(), random_maps(20))


def test_the_second_of_two_new_twins_replaces_the_first() -> None:
    """All argmaxes taken at once would put both where the old twin was, or keep both."""
    store = full_store()
    new_LE, key = random_maps(1, seed=5), random_keys(1, seed=5)
    first, second = store.add(
        new_LE.expand(2, L, E), Keys(key.prompts_TS, key.token_ids_T.repeat(2))
    ).tolist()
    assert first == second


def test_the_semantic_share_of_redundancy_grows_with_the_prefetch_distance() -> None:
    """Record 0 is alike in its key only, record 1 in its map only."""
    maps = torch.eye(E)[:2, None].expand(2, L, E)
    keys = Keys(torch.eye(S)[:2], torch.tensor([0, 1]))
    for prefetch_distance, replaced in [(1, 1), (2, 1), (3, 0), (4, 0)]:
        store = MapStore(
            capacity=2, num_layers=L, num_experts=E, dim=S, prefetch_distance=prefetch_distance
        )
        store.add(maps, keys)
        new_key = Keys(torch.eye(S)[0, None], torch.tensor([0]))
        assert store.add(maps[1, None], new_key).tolist() == [replaced]


def test_the_mean_is_that_of_the_records_that_are_left() -> None:
    store = full_store()
    store.add(random_maps(50, seed=2), random_keys(50, seed=2))
    assert torch.allclose(store.mean_LE, store.maps_LNE.float().mean(dim=1), atol=1e-6)
    assert not MapStore(capacity=1, num_layers=L, num_experts=E).mean_LE.any()


def test_a_restored_store_finds_and_replaces_the_same() -> None:
    store = full_store()
    store.add(random_maps(9, seed=3), random_keys(9, seed=3))
    again = MapStore(capacity=20, num_layers=L, num_experts=E, dim=S)
    again.load(store.tensors())
    queries = random_keys(5, seed=4)
    assert torch.equal(again.semantic_scores_TN(queries), store.semantic_scores_TN(queries))
    searches = [kept.begin(5) for kept in (store, again)]
    for search in searches:
        search.extend(random_maps(5, seed=4)[:, 0])
    assert torch.equal(searches[0].scores_TN(), searches[1].scores_TN())
    new = random_maps(30, seed=5), random_keys(30, seed=5)
    assert torch.equal(store.add(*new), again.add(*new))


def test_records_of_another_shape_or_too_many_are_refused() -> None:
    tensors = full_store().tensors()
    with pytest.raises(ValueError, match=r"\(5, 6, 4\).*\(5, 7, 4\)"):
        MapStore(capacity=20, num_layers=L, num_experts=7, dim=S).load(tensors)
    with pytest.raises(ValueError, match="20 records: capacity=19"):
        MapStore(capacity=19, num_layers=L, num_experts=E, dim=S).load(tensors)


def test_what_is_not_finite_is_neither_stored_nor_searched_for() -> None:
    store, bad = full_store(), random_maps(1)
    bad[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        store.add(bad, random_keys(1))
    with pytest.raises(ValueError, match="layer 0 hold NaN"):
        store.begin(1).extend(bad[:, 0])
    with pytest.raises(ValueError, match=r"shape \(2, 6\) in layer 0: must be \(1, 6\)"):
        store.begin(1).extend(torch.zeros(2, E))


@pytest.mark.parametrize(
    "option",
    [
        {"capacity": 0},
        {"prefetch_distance": 0},
        {"prefetch_distance": L + 1},
        {"token_weight": 2.0},
    ],
    ids=str,
)
def test_options_out_of_range_are_named(option: dict[str, float]) -> None:
    sizes = {"capacity": 9, "num_layers": L, "num_experts": E}
    with pytest.raises(ValueError, match=next(iter(option))):
        MapStore(**sizes | option)  # type: ignore[arg-type]
