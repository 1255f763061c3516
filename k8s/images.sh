#!/bin/sh
# Builds images with buildah alone, as root: no daemon, no registry of images.
#   k8s/images.sh serve train mlflow serve-gpu
# They start from Debian's Python, which mmdebstrap puts together. PYTHON_DIGEST=sha256:... takes
# python:3.13-slim-trixie of that digest instead. TAG is the project's version. BUILDAH_ARGS goes to every build.
set -eu
cd "$(dirname "$0")/.."
if ! command -v buildah >/dev/null; then
  echo "error: buildah is not installed; k8s/Dockerfile begins with the commands for docker" >&2
  exit 2
fi
export BUILDAH_ISOLATION="${BUILDAH_ISOLATION:-chroot}"
tag=${TAG:-$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)}
base=purebred-base

if [ -z "${PYTHON_DIGEST:-}" ] && ! buildah images --quiet "$base" >/dev/null 2>&1; then
  folder=$(mktemp -d)
  trap 'rm -r "$folder"' EXIT
  mmdebstrap --quiet --variant=minbase --include=ca-certificates,python3,python3-venv \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' trixie "$folder/base.tar"
  container=$(buildah from scratch)
  buildah add --quiet "$container" "$folder/base.tar" / >/dev/null
  buildah commit --quiet --rm "$container" "$base" >/dev/null
fi
for image in "$@"; do
  if [ -n "${PYTHON_DIGEST:-}" ]; then
    set -- --build-arg "PYTHON_DIGEST=$PYTHON_DIGEST"
  else
    digest=$(buildah inspect --type image --format '{{.FromImageDigest}}' "$base")
    set -- --build-arg "PYTHON=localhost/$base" --build-arg "PYTHON_DIGEST=$digest"
  fi
  # BUILDAH_ARGS is a list of words
  # shellcheck disable=SC2086
  buildah build --quiet -f k8s/Dockerfile "$@" --build-arg "SERVE=$image" --target "${image%-gpu}" \
    --tag "purebred-$image:$tag" ${BUILDAH_ARGS:-} .
done
