"""Images without labels, from which a network can learn what its teacher sees in them."""

from pathlib import Path

from bcnn.data.image_files import find_images
from bcnn.data.integrity import Finding, Findings, check
from bcnn.data.lookalikes import near_duplicates
from bcnn.utils.console import logger


def find_unlabelled(source: str | Path | None, labelled: Findings) -> dict[str, Finding]:
    """Return the findings of intact images that look like none of the labelled; log what is left out.

    The source is a folder with all below it, a list or a pattern; None: there are none.
    """
    if source is None:
        return {}
    found = check(Path(source), find_images([str(source)]))
    intact = {path: finding for path, finding in found.items() if not finding.error}
    hashes, others = (
        {path: finding.perceptual_hash for path, finding in each.items()} for each in (intact, labelled)
    )
    alike, digests = near_duplicates(hashes, others), {each.digest for each in labelled.values()}
    new = {p: each for p, each in intact.items() if p not in alike and each.digest not in digests}
    broken, known = len(found) - len(intact), len(intact) - len(new)
    logger.info(
        f"{source}: {len(new)} images without labels; left out are {broken} that cannot be decoded and "
        f"{known} that look like a labelled one"
    )
    return new
