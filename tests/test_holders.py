"""Who holds a shard, against a model that plays the rule word for word: every contract carries its own set of roots."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from storage.hosts.holders import Claim, Holders, decode_holders

OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["conclude", "renew", "write", "release"]), st.integers(0, 7)),
    min_size=1,
    max_size=40,
)


@given(OPERATIONS)
def test_a_contract_holds_what_its_lineage_wrote_and_it_did_not_release(operations: list[tuple[str, int]]) -> None:
    claims: list[Claim] = []
    # The model: does this contract hold the root? A write gives it to the whole lineage, a renewal copies, a release takes away.
    holds: list[bool] = []
    holders = Holders()
    for operation, number in operations:
        index = number % len(claims) if claims else 0
        contract_id, ordinal = f"{len(claims) + 1:032x}", len(claims) + 1
        if operation == "conclude" or not claims:
            claims.append(Claim(contract_id, ((contract_id, ordinal),)))
            holds.append(False)
        elif operation == "renew":
            claims.append(Claim(claims[index].lineage, ((contract_id, ordinal), *claims[index].chain)))
            holds.append(holds[index])
        elif operation == "write":
            holders.write(claims[index].lineage)
            holds = [held or claim.lineage == claims[index].lineage for held, claim in zip(holds, claims, strict=True)]
        else:
            holders.release(claims[index], len(claims))
            holds[index] = False
        holders = decode_holders(holders.encode(), bytes(32))
        assert [holders.held_by(claim) for claim in claims] == holds
        assert holders.held(claims) == any(holds)
