package main

import (
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"sync"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/miekg/dns"
	"github.com/spf13/cobra"
)

// Stand-in for a DNS provider: the name server of one zone, and an API that changes its TXT records for whoever has the
// token. (Pebble's challtestsrv has no SOA, by which Caddy finds the zone, and takes no token.)
type standin struct {
	zone, token string
	lock        sync.Mutex
	records     []record
	// Records that were added so far, also those that were deleted again.
	added int
}

func init() {
	caddycmd.RegisterCommand(caddycmd.Command{
		Name:  "dns-standin",
		Usage: "--zone <zone> --token <token> --dns <address> --api <address>",
		Short: "Stands in for a DNS provider in tests",
		CobraFunc: func(command *cobra.Command) {
			for _, name := range []string{"zone", "token", "dns", "api"} {
				command.Flags().String(name, "", "")
			}
			command.RunE = caddycmd.WrapCommandFuncForCobra(run)
		},
	})
}

func run(flags caddycmd.Flags) (int, error) {
	s := &standin{zone: dns.Fqdn(flags.String("zone")), token: flags.String("token")}
	ended := make(chan error)
	for _, network := range []string{"udp", "tcp"} {
		server := &dns.Server{Addr: flags.String("dns"), Net: network, Handler: dns.HandlerFunc(s.resolve)}
		go func() { ended <- server.ListenAndServe() }()
	}
	go func() { ended <- http.ListenAndServe(flags.String("api"), http.HandlerFunc(s.api)) }()
	return 1, <-ended
}

// Answers a question of DNS.
func (s *standin) resolve(w dns.ResponseWriter, question *dns.Msg) {
	answer := new(dns.Msg).SetReply(question)
	answer.Authoritative = true
	q := question.Question[0]
	name := strings.ToLower(q.Name)
	add := func(rr string) {
		parsed, err := dns.NewRR(rr)
		if err == nil {
			answer.Answer = append(answer.Answer, parsed)
		}
	}
	switch {
	case !dns.IsSubDomain(s.zone, name):
		answer.Rcode = dns.RcodeRefused
	case q.Qtype == dns.TypeSOA && name == s.zone:
		add(s.zone + " 1 IN SOA ns." + s.zone + " ops." + s.zone + " 1 1 1 1 1")
	case q.Qtype == dns.TypeNS && name == s.zone:
		add(s.zone + " 1 IN NS ns." + s.zone)
	case q.Qtype == dns.TypeTXT:
		s.lock.Lock()
		for _, one := range s.records {
			if one.Name == name {
				add(name + " 1 IN TXT \"" + one.Value + "\"")
			}
		}
		s.lock.Unlock()
	}
	w.WriteMsg(answer)
}

// Answers a request of the API.
func (s *standin) api(w http.ResponseWriter, r *http.Request) {
	s.lock.Lock()
	defer s.lock.Unlock()
	if r.Method == http.MethodGet {
		json.NewEncoder(w).Encode(map[string]int{"added": s.added, "present": len(s.records)})
		return
	}
	if r.Header.Get("Authorization") != "Bearer "+s.token {
		http.Error(w, "this token may not change the zone", http.StatusForbidden)
		return
	}
	var wanted record
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 4096)).Decode(&wanted); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if r.Method == http.MethodPost {
		s.added++
		s.records = append(s.records, wanted)
		return
	}
	s.records = slices.DeleteFunc(s.records, func(one record) bool { return one == wanted })
}
