#!/usr/bin/env bash
# The RayService of docs/deploy/rayservice.yaml, in the cluster and namespace that kubectl points at.
#
#     IMAGE=registry.example.org/dist-infer:1 kuberay.sh up [MANIFEST]      operator, keys, service; waits until it serves
#     kuberay.sh down [MANIFEST]                                            the service and its ConfigMap
#
# Needs kubectl and helm. KEYS: what DIST_INFER_API_KEYS is to hold (me=… made here and printed once).
set -euo pipefail
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
[ $# -ge 1 ] || usage
manifest=${2:-$(dirname "$0")/rayservice.yaml}
operator_version=1.5.1 # the first that knows authOptions

case $1 in
up)
    : "${IMAGE:?set IMAGE to the image that the nodes pull}"
    if ! kubectl get crd rayservices.ray.io >/dev/null 2>&1; then
        helm upgrade --install kuberay-operator kuberay-operator --version "$operator_version" \
            --repo https://ray-project.github.io/kuberay-helm/ --wait
    fi
    if ! kubectl get secret dist-infer-keys >/dev/null 2>&1; then
        if [ -z "${KEYS:-}" ]; then
            KEYS="me=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')"
            echo "key: ${KEYS#*=}"
        fi
        # through standard input: arguments can be seen by everybody on a machine
        printf %s "$KEYS" | kubectl create secret generic dist-infer-keys --from-file=keys=/dev/stdin
    fi
    sed "s|^\( *image:\) dist-infer$|\1 $IMAGE|" "$manifest" | kubectl apply -f -
    kubectl wait --for=condition=Ready --timeout=2h rayservice/dist-infer
    echo "kubectl port-forward service/dist-infer-serve-svc 8000"
    ;;
down)
    kubectl delete -f "$manifest" --ignore-not-found --wait
    ;;
*) usage ;;
esac
