//! The fake's service for operators.

use daemon::status::Refusal;
use proto::sandbox::v1::{operator_service_server::OperatorService, *};
use tonic::{Request, Response, Status};

use proto::{Progress, Reason};

use crate::audit;

use super::{Answer, ID, Service, Streamed, known, refuse, sandbox};

/// Team of the fake, with limits of its own.
fn team(name: &str, own: Option<proto::limits::TeamLimits>) -> Team {
    let own = own.unwrap_or_default();
    let defaults = proto::limits::TeamLimits::stored("sandboxes=20 creates=10/hour streams=4096");
    Team {
        name: name.into(),
        limits: Some(own.clone().into()),
        effective: Some(own.or(defaults).into()),
        usage: Some(TeamUsage {
            sandboxes: 3,
            cpu_cores: 6,
            memory_mib: 6144,
            disk_gib: 60,
            creates: 2,
            execs: 7,
            running_execs: 5,
            streams: 9,
            output_mib: 12,
            events: 340,
            changes: 1,
        }),
    }
}

/// The fake's only SSH key.
fn ssh_key() -> SshKey {
    SshKey {
        id: TOKEN_ID.into(),
        name: "laptop".into(),
        team: "lab".into(),
        public_key: "ssh-ed25519 AAAA".into(),
        fingerprint: "SHA256:abc".into(),
        added_by: TOKEN_ID.into(),
        created_at: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 }),
        ..SshKey::default()
    }
}

/// Id of the fake's only token.
const TOKEN_ID: &str = "0123456789ab";

#[tonic::async_trait]
impl OperatorService for Service {
    async fn list_nodes(&self, _: Request<ListNodesRequest>) -> Answer<ListNodesResponse> {
        let load = NodeLoad {
            cores: 2.0,
            cpu_busy: 0.5,
            memory_total: 4 << 30,
            memory_available: 1 << 30,
            quorate: true,
            ..NodeLoad::default()
        };
        let node = |name: &str, load: Option<NodeLoad>| Node {
            name: name.into(),
            ready: load.is_some(),
            reason: if load.is_some() { String::new() } else { "UNREACHABLE".into() },
            version: "0.1.0".into(),
            report_age: load.is_some().then_some(prost_types::Duration { seconds: 1, nanos: 0 }),
            load,
            ..Node::default()
        };
        let nodes = vec![node("node1", Some(load)), node("node2", None)];
        Ok(Response::new(ListNodesResponse { nodes }))
    }

    type WatchAllEventsStream = Streamed<WatchAllEventsResponse>;

    async fn watch_all_events(
        &self,
        request: Request<WatchAllEventsRequest>,
    ) -> Answer<Self::WatchAllEventsStream> {
        let WatchAllEventsRequest { after_revision, last, follow, .. } = request.into_inner();
        let said = self.0.events.say(after_revision, last, follow)?;
        let said = said.into_iter().map(|said| {
            let (event, revision) = said?;
            Ok(WatchAllEventsResponse { event, revision })
        });
        Ok(Response::new(Box::pin(tokio_stream::iter(said.collect::<Vec<_>>()))))
    }

    async fn fsck(&self, _: Request<FsckRequest>) -> Answer<FsckResponse> {
        let finding = Finding {
            invariant: Invariant::I1.into(),
            node: "node1".into(),
            subject: "local-zfs:subvol-100009-disk-0".into(),
            detail: "a volume without a record".into(),
        };
        Ok(Response::new(FsckResponse { findings: vec![finding], sandboxes: 3, nodes: 2 }))
    }

    async fn collect_garbage(
        &self,
        request: Request<CollectGarbageRequest>,
    ) -> Answer<CollectGarbageResponse> {
        let CollectGarbageRequest { node, .. } = request.into_inner();
        let item = GarbageItem {
            node: "node1".into(),
            action: GarbageAction::Quarantined.into(),
            subject: "100017".into(),
            why: "this node's journal does not know it".into(),
        };
        let (items, unreachable) = match node.as_str() {
            "node1" => (vec![item], Vec::new()),
            _ => (Vec::new(), vec!["node2".into()]),
        };
        Ok(Response::new(CollectGarbageResponse { items, unreachable }))
    }

    async fn recover_sandbox(
        &self,
        _: Request<RecoverSandboxRequest>,
    ) -> Answer<RecoverSandboxResponse> {
        Ok(Response::new(RecoverSandboxResponse { sandbox: known(ID, Phase::Running)? }))
    }

    async fn adopt_sandbox(
        &self,
        request: Request<AdoptSandboxRequest>,
    ) -> Answer<AdoptSandboxResponse> {
        let volumes = vec![format!("local:vm-{}-disk-0", request.get_ref().vmid)];
        Ok(Response::new(AdoptSandboxResponse { sandbox: known(ID, Phase::Running)?, volumes }))
    }

    async fn release_sandbox(
        &self,
        request: Request<ReleaseSandboxRequest>,
    ) -> Answer<ReleaseSandboxResponse> {
        let sandbox = known(&request.get_ref().id, Phase::Deleted)?;
        Ok(Response::new(ReleaseSandboxResponse { sandbox }))
    }

    async fn cordon_node(&self, _: Request<CordonNodeRequest>) -> Answer<CordonNodeResponse> {
        Ok(Response::new(CordonNodeResponse {}))
    }

    async fn uncordon_node(&self, _: Request<UncordonNodeRequest>) -> Answer<UncordonNodeResponse> {
        Ok(Response::new(UncordonNodeResponse {}))
    }

    async fn drain_node(&self, _: Request<DrainNodeRequest>) -> Answer<DrainNodeResponse> {
        Ok(Response::new(DrainNodeResponse {
            remaining: known(ID, Phase::Running)?.into_iter().collect(),
            moved: vec![Sandbox {
                node: "node1".into(),
                ..sandbox(Phase::Stopped, Progress::Done)
            }],
            stays: [(ID.to_owned(), "node3 does not see its disk".to_owned())].into(),
        }))
    }

    async fn forget_node(&self, _: Request<ForgetNodeRequest>) -> Answer<ForgetNodeResponse> {
        let sandboxes = known(ID, Phase::Unreachable)?.into_iter().collect();
        Ok(Response::new(ForgetNodeResponse { sandboxes }))
    }

    async fn create_token(
        &self,
        request: Request<CreateTokenRequest>,
    ) -> Answer<CreateTokenResponse> {
        let CreateTokenRequest { team, name, user, scopes, ttl, csr } = request.into_inner();
        if name == "taken" {
            return Err(refuse(Reason::NameTaken));
        }
        let (created, later) = (1_700_000_000, ttl.map(|ttl| 1_700_000_000 + ttl.seconds));
        let at = |seconds| prost_types::Timestamp { seconds, nanos: 0 };
        let token = Token {
            id: TOKEN_ID.into(),
            name: if name.is_empty() { TOKEN_ID.into() } else { name },
            team: if team.is_empty() { "lab".into() } else { team },
            user,
            scopes: if scopes.is_empty() { vec![1, 2, 3] } else { scopes },
            created_at: Some(at(created)),
            expires_at: later.map(at),
            ..Token::default()
        };
        if !csr.is_empty() {
            assert!(csr.contains("CERTIFICATE REQUEST") && !csr.contains("PRIVATE KEY"), "{csr}");
            let token = Some(Token { certificate: true, ..token });
            let certificate = "-----BEGIN CERTIFICATE-----\n".into();
            return Ok(Response::new(CreateTokenResponse {
                token,
                text: String::new(),
                certificate,
            }));
        }
        let text = format!("pvesb_{TOKEN_ID}_{}", "f".repeat(64));
        let token = Some(token);
        Ok(Response::new(CreateTokenResponse { token, text, certificate: String::new() }))
    }

    async fn list_tokens(&self, request: Request<ListTokensRequest>) -> Answer<ListTokensResponse> {
        let ListTokensRequest { include_ended, page_token, .. } = request.into_inner();
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let token = |name: &str, revoked_at| Token {
            id: TOKEN_ID.into(),
            name: name.into(),
            team: "lab".into(),
            scopes: vec![Scope::Read.into(), Scope::Exec.into()],
            created_at: at(1_700_000_000),
            revoked_at,
            ..Token::default()
        };
        // Two pages, the second with what has ended.
        let (tokens, next) = match page_token.as_str() {
            "" if include_ended => (vec![token("ci", None)], "2".to_owned()),
            "" => (vec![token("ci", None)], String::new()),
            _ => (vec![token("old", at(1_700_000_100))], String::new()),
        };
        Ok(Response::new(ListTokensResponse { tokens, next_page_token: next }))
    }

    async fn revoke_token(
        &self,
        request: Request<RevokeTokenRequest>,
    ) -> Answer<RevokeTokenResponse> {
        let RevokeTokenRequest { token: named, team } = request.into_inner();
        if named != "ci" && named != TOKEN_ID {
            return Err(refuse(Reason::TokenNotFound));
        }
        let token = Token {
            id: TOKEN_ID.into(),
            name: "ci".into(),
            team: if team.is_empty() { "lab".into() } else { team },
            revoked_at: Some(prost_types::Timestamp { seconds: 1_700_000_100, nanos: 0 }),
            ..Token::default()
        };
        Ok(Response::new(RevokeTokenResponse { token: Some(token) }))
    }

    async fn add_ssh_key(&self, request: Request<AddSshKeyRequest>) -> Answer<AddSshKeyResponse> {
        let AddSshKeyRequest { name, public_key, .. } = request.into_inner();
        if name == "taken" {
            return Err(refuse(Reason::NameTaken));
        }
        let key = Some(SshKey { name, public_key, ..ssh_key() });
        Ok(Response::new(AddSshKeyResponse { key }))
    }

    async fn list_ssh_keys(&self, _: Request<ListSshKeysRequest>) -> Answer<ListSshKeysResponse> {
        let keys = vec![ssh_key()];
        Ok(Response::new(ListSshKeysResponse { keys, next_page_token: String::new() }))
    }

    async fn remove_ssh_key(
        &self,
        request: Request<RemoveSshKeyRequest>,
    ) -> Answer<RemoveSshKeyResponse> {
        if request.into_inner().key != "laptop" {
            return Err(refuse(Reason::TokenNotFound));
        }
        let removed_at = Some(prost_types::Timestamp { seconds: 1_700_000_100, nanos: 0 });
        let key = Some(SshKey { removed_at, ..ssh_key() });
        Ok(Response::new(RemoveSshKeyResponse { key }))
    }

    async fn list_teams(&self, _: Request<ListTeamsRequest>) -> Answer<ListTeamsResponse> {
        let teams = ["acme", "lab"].map(|name| team(name, None));
        Ok(Response::new(ListTeamsResponse { teams: teams.into(), ..Default::default() }))
    }

    async fn get_team(&self, request: Request<GetTeamRequest>) -> Answer<GetTeamResponse> {
        let name = request.into_inner().name;
        let name = if name.is_empty() { "lab" } else { &name };
        Ok(Response::new(GetTeamResponse { team: Some(team(name, None)) }))
    }

    async fn update_team(&self, request: Request<UpdateTeamRequest>) -> Answer<UpdateTeamResponse> {
        let UpdateTeamRequest { team: asked, update_mask } = request.into_inner();
        let (asked, paths) = (asked.unwrap_or_default(), update_mask.unwrap_or_default().paths);
        let limits = proto::limits::TeamLimits::default();
        let limits = limits.updated(&asked.limits.unwrap_or_default(), &paths);
        let limits = limits.map_err(|why| Status::from(Refusal::from(why)))?;
        let team = team(&asked.name, Some(limits));
        Ok(Response::new(UpdateTeamResponse { team: Some(team) }))
    }

    type ListAuditStream = Streamed<ListAuditResponse>;

    async fn list_audit(
        &self,
        request: Request<ListAuditRequest>,
    ) -> Answer<Self::ListAuditStream> {
        let ListAuditRequest { team, last, .. } = request.into_inner();
        let mut entries = audit::entries();
        entries.retain(|entry| team.is_empty() || entry.team == team);
        let entries = entries.split_off(entries.len().saturating_sub(last as usize));
        let pages = entries.into_iter().map(|entry| Ok(ListAuditResponse { entries: vec![entry] }));
        Ok(Response::new(Box::pin(tokio_stream::iter(pages.collect::<Vec<_>>()))))
    }

    type ExportAuditStream = Streamed<ExportAuditResponse>;

    async fn export_audit(
        &self,
        _: Request<ExportAuditRequest>,
    ) -> Answer<Self::ExportAuditStream> {
        let (lines, _) = audit::log();
        let pages = vec![Ok(ExportAuditResponse { lines: lines.into() })];
        Ok(Response::new(Box::pin(tokio_stream::iter(pages))))
    }

    async fn verify_audit(
        &self,
        request: Request<VerifyAuditRequest>,
    ) -> Answer<VerifyAuditResponse> {
        let (_, head) = audit::log();
        let known = AuditHead { seq: head.seq, sha256: head.hash.to_string() };
        let expected = request.into_inner().expected;
        let broken = expected.filter(|expected| *expected != known).map(|expected| AuditFault {
            seq: expected.seq,
            detail: "the line has another hash than the one that was noted".into(),
            file: "audit-00000000000000000001.jsonl".into(),
        });
        Ok(Response::new(VerifyAuditResponse {
            entries: 3,
            first_seq: 1,
            head: Some(known),
            gaps: 1,
            lost: 92,
            broken,
        }))
    }

    async fn get_version(&self, _: Request<GetVersionRequest>) -> Answer<GetVersionResponse> {
        Ok(Response::new(GetVersionResponse {
            version: "0.9.9".into(),
            epoch: 4,
            ssh: Some(SshServer {
                host: String::new(),
                port: 2222,
                host_key: "ssh-ed25519 AAAA".into(),
            }),
        }))
    }
}
