package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/libdns/libdns"
)

// Variable with the URL of the API. Real providers have a fixed one.
const apiVariable = "DNS_STANDIN_API"

// Record of the zone, as the API has it.
type record struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// Provider is a module of Caddy in the form of the real ones: one field for the token, which may hold a placeholder.
type Provider struct {
	APIToken string `json:"api_token,omitempty"`
}

func init() { caddy.RegisterModule(Provider{}) }

// CaddyModule names the module.
func (Provider) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "dns.providers.standin", New: func() caddy.Module { return new(Provider) }}
}

// Provision replaces placeholders in the token, as real modules do.
func (p *Provider) Provision(caddy.Context) error {
	p.APIToken = caddy.NewReplacer().ReplaceAll(p.APIToken, "")
	return nil
}

// AppendRecords adds records to a zone.
func (p *Provider) AppendRecords(ctx context.Context, zone string, all []libdns.Record) ([]libdns.Record, error) {
	return all, p.send(ctx, http.MethodPost, zone, all)
}

// DeleteRecords removes records from a zone.
func (p *Provider) DeleteRecords(ctx context.Context, zone string, all []libdns.Record) ([]libdns.Record, error) {
	return all, p.send(ctx, http.MethodDelete, zone, all)
}

func (p *Provider) send(ctx context.Context, method, zone string, all []libdns.Record) error {
	for _, one := range all {
		rr := one.RR()
		body, err := json.Marshal(record{strings.ToLower(libdns.AbsoluteName(rr.Name, zone)), rr.Data})
		if err != nil {
			return err
		}
		url := os.Getenv(apiVariable) + "/records"
		request, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
		if err != nil {
			return err
		}
		request.Header.Set("Authorization", "Bearer "+p.APIToken)
		answer, err := http.DefaultClient.Do(request)
		if err != nil {
			return err
		}
		why, err := io.ReadAll(io.LimitReader(answer.Body, 1024))
		answer.Body.Close()
		if err != nil {
			return err
		}
		if answer.StatusCode != http.StatusOK {
			return fmt.Errorf("the provider answers %s: %s", answer.Status, bytes.TrimSpace(why))
		}
	}
	return nil
}

var (
	_ caddy.Provisioner     = (*Provider)(nil)
	_ libdns.RecordAppender = (*Provider)(nil)
	_ libdns.RecordDeleter  = (*Provider)(nil)
)
