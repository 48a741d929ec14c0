"""The images that forge made in an engine: what there is, and removing them."""

from __future__ import annotations

import contextlib
import datetime
from typing import Any

from docker.errors import APIError, NotFound

from forge.executor import KeptImage
from forge.finding import Finding, warning

# Labels: of environments and stages, its own name or its environment's tag; of the serving image, its key.
ENVIRONMENT, KEY = "io.annie.environment", "io.annie.key"
_SHORT = len("sha256:") + 12  # of an id, as the docker command shows it


def kept(client: Any) -> list[KeptImage]:
    """Every image with forge's labels: by each tag but `latest`, by that one if it has no other, or by its id
    if it has none (another took its tag).
    """
    listed = [client.api.images(filters={"label": label}) for label in (ENVIRONMENT, KEY)]
    images = []
    for shown in {image["Id"]: image for images in listed for image in images}.values():
        tags = shown["RepoTags"] or []
        created = _tagged(client, shown)
        key = (shown["Labels"] or {}).get(KEY, "")
        names = [tag for tag in tags if not tag.endswith(":latest")] or tags or [shown["Id"][:_SHORT]]
        images += [KeptImage(name, shown["Size"], created, key) for name in names]
    return images


def _tagged(client: Any, shown: dict[str, Any]) -> datetime.datetime:
    """When an image got its newest tag here: builds have no date of their own (SOURCE_DATE_EPOCH)."""
    times = [datetime.datetime.fromtimestamp(shown["Created"], datetime.UTC)]
    for name in shown["RepoTags"] or [shown["Id"]]:
        with contextlib.suppress(NotFound):  # removed by somebody since it was listed
            if tagged := client.api.inspect_image(name).get("Metadata", {}).get("LastTagTime"):
                times.append(datetime.datetime.fromisoformat(tagged))
    return max(times)


def remove(client: Any, name: str) -> Finding | None:
    """Removes a tag, and `latest` where it names the same image. Why not, if a container uses the image: it
    keeps its tags then, since nothing else would find it again.
    """
    try:
        image = client.images.get(name)
        users = [each for each in client.api.containers(all=True) if each["ImageID"] == image.id]
        if users:
            containers = [each["Names"][0].lstrip("/") for each in users]
            return warning(
                name,
                f"an image that a container uses: {', '.join(containers)}",
                "one that nothing uses",
                f"Stop and remove it (docker rm --force {' '.join(containers)}), then run gc again.",
            )
        latest = f"{name.rpartition(':')[0]}:latest"
        for tag in (name, *(tag for tag in image.tags if tag == latest != name)):
            client.images.remove(tag)
    except NotFound:
        return None
    except APIError as fault:
        return warning(name, f"{fault.explanation or fault}", "an image that nothing uses", "")
    return None
