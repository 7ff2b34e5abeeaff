// Caddy with a DNS provider of ours for the tests of ACME (tests/ingress/acme.rs). The command `dns-standin` is what
// this provider talks to. `.ci/tools caddy-acme` builds it.
package main

import (
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
)

func main() { caddycmd.Main() }
