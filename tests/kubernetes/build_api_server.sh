#!/bin/bash
# Makes kube-apiserver and etcd from packages of Debian 12, without root and without installing anything:
#
#     bash tests/kubernetes/build_api_server.sh FOLDER
#
# Needs apt, dpkg-dev, make, gcc and the keyring of Debian. Downloads 125 MB, takes 3 GB of disk while it builds and
# about 15 minutes of one core. Go builds in as many processes as there are cores; GOFLAGS=-p=1 lets it use one.
# An interrupted build is continued. MIRROR is a mirror of Debian other than http://deb.debian.org/debian.
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "error: usage: $0 FOLDER" >&2
    exit 2
fi
for program in apt-get dpkg-source make gcc; do
    command -v "$program" >/dev/null || { echo "error: $program is missing; fix: apt install dpkg-dev make gcc" >&2; exit 2; }
done
mkdir -p "$1/build"
output=$(cd "$1" && pwd -P)
build="$output/build"
cd "$build"

if [ ! -e complete-sources ]; then
    rm -rf kubernetes-*/
    # The lists and archives of apt itself stay as they are.
    mkdir -p lists/partial archives/partial
    mirror=${MIRROR:-http://deb.debian.org/debian}
    printf '%s bookworm main\n' "deb $mirror" "deb-src $mirror" >sources.list
    apt=(apt-get -q -o "Dir::Etc::SourceList=$build/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State::Lists=$build/lists" -o "Dir::Cache=$build" -o APT::Sandbox::User=)
    "${apt[@]}" update
    "${apt[@]}" download etcd-server golang-1.19-go golang-1.19-src golang-github-modern-go-reflect2-dev jq libjq1 \
        libonig5 libpopt0 libxxhash0 rsync
    "${apt[@]}" source kubernetes
    for package in *.deb; do
        dpkg -x "$package" packages
    done
    # The version in the source ends the server at the first custom resource if Go 1.18 or later has compiled it.
    reflect2=$(echo kubernetes-*/vendor/github.com/modern-go/reflect2)
    rm "$reflect2"/*.{go,s}
    cp packages/usr/share/gocode/src/github.com/modern-go/reflect2/*.{go,s} "$reflect2/"
    touch complete-sources
fi

export GOROOT="$build/packages/usr/lib/go-1.19" CGO_ENABLED=0
export PATH="$GOROOT/bin:$PATH:$build/packages/usr/bin"
export LD_LIBRARY_PATH="$build/packages/usr/lib/$(gcc -print-multiarch)"
cd kubernetes-*/
mkdir -p .go/src/k8s.io
ln -sfn ../../.. .go/src/k8s.io/kubernetes
GOPATH="$PWD/.go" make WHAT=cmd/kube-apiserver KUBE_GIT_VERSION=v1.20.2 KUBE_GIT_TREE_STATE=archive KUBE_GIT_COMMIT=debian
mv _output/local/bin/*/*/kube-apiserver "$build/packages/usr/bin/etcd" "$output/"
chmod -R u+w "$build"
rm -rf "$build"
echo "made $output/kube-apiserver and $output/etcd"
