//! Nodes that join with a one-time token, and nodes that are turned away.

use proto::sandbox::v1::{
    CreateNodeTokenRequest, JoinRequest, JoinResponse, RevokeNodeRequest,
    enrolment_service_client::EnrolmentServiceClient,
};
use rcgen::{CertificateParams, KeyPair};

use super::*;
use crate::{
    ca::{self, Lives, Signer},
    enrolment::Settings,
};

/// Keys of a node that joins.
struct Keys(KeyPair, KeyPair);

impl Keys {
    fn new() -> Self {
        let key = || KeyPair::generate().expect("a key");
        Self(key(), key())
    }

    fn request(&self, token: &str, node: &str, pool: &str) -> JoinRequest {
        let csr = |key: &KeyPair| {
            let params = CertificateParams::default();
            params.serialize_request(key).expect("a request").pem().expect("PEM")
        };
        JoinRequest {
            token: token.into(),
            node: node.into(),
            address: format!("{node}.test:7445"),
            agent_csr: csr(&self.0),
            ingress_csr: csr(&self.1),
            pool: pool.into(),
            number: 7,
        }
    }
}

/// A controller with a CA in a directory of its own.
async fn lab() -> (Lab, tempfile::TempDir) {
    let lab = Lab::new().await;
    let dir = tempfile::tempdir().expect("a directory");
    ca::init(dir.path(), &["controller.test".into()]).expect("a CA");
    enrol(&lab, dir.path());
    (lab, dir)
}

fn enrol(lab: &Lab, dir: &std::path::Path) {
    let signer = Signer::load(dir, Lives::default()).expect("the CA");
    let settings = Settings {
        domain: Some("sandbox.test".into()),
        https: true,
        names: vec!["controller.test".into()],
    };
    lab.controller.as_ref().expect("a controller").enrol(signer, settings);
}

impl Lab {
    fn enrolment(&self) -> EnrolmentServiceClient<InterceptedService<Channel, Auth>> {
        EnrolmentServiceClient::with_interceptor(self.channel(), bearer(&self.red))
    }

    async fn node_token(&self, node: &str) -> String {
        let request = CreateNodeTokenRequest { node: node.into(), ttl_s: 0 };
        let answer = self.enrolment().create_node_token(request).await.expect("a token");
        answer.into_inner().token
    }

    /// Joins without any bearer token, as a node does.
    async fn join(&self, request: JoinRequest) -> Result<JoinResponse, Status> {
        let answer = EnrolmentServiceClient::new(self.channel()).join(request).await?;
        Ok(answer.into_inner())
    }

    async fn revoke(&self, node: &str) -> Result<u32, Status> {
        let request = RevokeNodeRequest { node: node.into() };
        Ok(self.enrolment().revoke_node(request).await?.into_inner().sandboxes)
    }
}

#[tokio::test(start_paused = true)]
async fn node_joins_once_with_a_token_of_its_name() {
    let (lab, _dir) = lab().await;
    let token = lab.node_token("n7").await;
    let keys = Keys::new();
    let refused = |answer| assert_eq!(reason(answer), Reason::TokenInvalid);
    refused(lab.join(keys.request(&token, "n8", "")).await);
    refused(lab.join(keys.request("pvesj_000000000000_00", "n7", "")).await);
    let wrong = format!("{}{}", &token[..token.len() - 4], "0000");
    refused(lab.join(keys.request(&wrong, "n7", "")).await);

    let joined = lab.join(keys.request(&token, "n7", "")).await.expect("it joins");
    assert_eq!((joined.pool.as_str(), joined.domain.as_str()), ("10.100.7.0/24", "sandbox.test"));
    let fits = |pem: &str, key: &KeyPair| {
        daemon::tls::fits(pem.as_bytes(), key.serialize_pem().as_bytes())
    };
    assert!(fits(&joined.agent_certificate, &keys.0) && fits(&joined.ingress_certificate, &keys.1));
    assert_ne!(joined.ca, joined.ingress_ca);
    // The registry knows it at once.
    let statuses = lab.domain().nodes().statuses();
    let n7 = statuses.iter().find(|status| status.name.as_str() == "n7").expect("it is known");
    assert_eq!(n7.address, "n7.test:7445");
    assert!(n7.certificate.is_some());

    // A replay with other keys is refused; the node itself may repeat its call.
    refused(lab.join(Keys::new().request(&token, "n7", "")).await);
    let again = lab.join(keys.request(&token, "n7", "")).await.expect("its answer was lost");
    assert_eq!(again.pool, joined.pool);
    assert_ne!(again.agent_certificate, joined.agent_certificate);
}

#[tokio::test(start_paused = true)]
async fn token_of_a_node_expires_and_a_new_one_voids_it() {
    let (lab, _dir) = lab().await;
    let keys = Keys::new();
    let first = lab.node_token("n7").await;
    let second = lab.node_token("n7").await;
    let answer = lab.join(keys.request(&first, "n7", "")).await;
    assert_eq!(reason(answer), Reason::TokenInvalid);
    tokio::time::sleep(Duration::from_secs(15 * 60 + 1)).await;
    let answer = lab.join(keys.request(&second, "n7", "")).await;
    assert_eq!(reason(answer), Reason::TokenInvalid);
    for ttl_s in [1, 59, 86_401] {
        let request = CreateNodeTokenRequest { node: "n7".into(), ttl_s };
        let answer = lab.enrolment().create_node_token(request).await;
        assert_eq!(reason(answer), Reason::FieldInvalid);
    }
}

#[tokio::test(start_paused = true)]
async fn two_nodes_with_one_pool_are_refused_and_the_token_stays_good() {
    let (lab, _dir) = lab().await;
    let join = async |node: &str, pool: &str| {
        let token = lab.node_token(node).await;
        lab.join(Keys::new().request(&token, node, pool)).await
    };
    join("n7", "10.9.0.0/16").await.expect("it joins");
    let (token, keys) = (lab.node_token("n8").await, Keys::new());
    let answer = lab.join(keys.request(&token, "n8", "10.9.3.2-10.9.3.254")).await;
    let status = answer.expect_err("an overlap");
    assert!(status.message().contains("n7"), "{status:?}");
    assert_eq!(reason::<()>(Err(status)), Reason::AddressConflict);
    let joined =
        lab.join(keys.request(&token, "n8", "10.8.0.0/16")).await.expect("other addresses");
    assert_eq!(joined.pool, "10.8.0.0/16");
    // A node that asks for none keeps what it had; a new one gets what is free.
    assert_eq!(join("n8", "").await.expect("again").pool, "10.8.0.0/16");
    assert_eq!(join("n9", "").await.expect("it joins").pool, "10.100.7.0/24");
    assert_eq!(join("n10", "").await.expect("it joins").pool, "10.100.1.0/24");
    assert_eq!(reason(join("n11", "no pool").await), Reason::FieldInvalid);
}

#[tokio::test(start_paused = true)]
async fn joined_node_is_known_after_a_crash_until_it_is_forgotten() {
    let (mut lab, dir) = lab().await;
    let token = lab.node_token("n7").await;
    let keys = Keys::new();
    lab.join(keys.request(&token, "n7", "")).await.expect("it joins");
    lab.start().await;
    enrol(&lab, dir.path());
    let known = |lab: &Lab| lab.domain().nodes().get(&"n7".parse().expect("name")).is_some();
    assert!(known(&lab));
    // A crash of the node midway: the same line works against the new controller, too.
    lab.join(keys.request(&token, "n7", "")).await.expect("again");
    let request =
        proto::sandbox::v1::ForgetNodeRequest { node: "n7".into(), lost: true, dry_run: false };
    lab.operator().forget_node(request).await.expect("forgotten");
    lab.start().await;
    assert!(!known(&lab));
    enrol(&lab, dir.path());
    let token = lab.node_token("n8").await;
    let joined = lab.join(Keys::new().request(&token, "n8", "")).await.expect("it joins");
    assert_eq!(joined.pool, "10.100.7.0/24", "the addresses of a forgotten node are free");
}

#[tokio::test(start_paused = true)]
async fn revoked_node_is_refused_until_it_joins_again() {
    let (mut lab, dir) = lab().await;
    assert_eq!(reason(lab.revoke("n99").await), Reason::NodeNotFound);
    let n7 = "n7".parse().expect("name");
    let der = |pem: &str| {
        let der = rustls::pki_types::pem::PemObject::from_pem_slice(pem.as_bytes());
        let der: rustls::pki_types::CertificateDer<'static> = der.expect("PEM");
        der.to_vec()
    };
    let (token, keys) = (lab.node_token("n7").await, Keys::new());
    let joined = lab.join(keys.request(&token, "n7", "")).await.expect("it joins");
    let first = der(&joined.agent_certificate);
    let accepts = |lab: &Lab, der: &[u8]| lab.domain().nodes().certificates().check(&n7, der);
    let open = accepts(&lab, &first).expect("accepted");
    assert_eq!(lab.revoke("n7").await.expect("revoked"), 0);
    assert!(open.is_cancelled(), "its connections are closed");
    accepts(&lab, &first).expect_err("revoked");
    // Its token is void, also for the same keys.
    assert_eq!(reason(lab.join(keys.request(&token, "n7", "")).await), Reason::TokenInvalid);
    lab.start().await;
    enrol(&lab, dir.path());
    accepts(&lab, &first).expect_err("still revoked");

    let token = lab.node_token("n7").await;
    let joined = lab.join(Keys::new().request(&token, "n7", "")).await.expect("it joins again");
    let second = der(&joined.agent_certificate);
    accepts(&lab, &second).expect("accepted");
    accepts(&lab, &first).expect_err("the old one stays revoked");
    lab.start().await;
    accepts(&lab, &second).expect("accepted after a restart");
    accepts(&lab, &first).expect_err("and the old one is not");
}

#[tokio::test(start_paused = true)]
async fn commands_on_a_revoked_node_end_at_once_for_their_callers() {
    let (lab, _dir) = lab().await;
    let sandbox = lab.create("r1").await.expect("made");
    let start = super::exec::argv(&sandbox.id, &["sleep"]);
    let start = super::exec::message(proto::sandbox::v1::exec_request::Message::Start(start));
    let input = futures_util::StreamExt::chain(
        futures_util::stream::iter([start]),
        futures_util::stream::pending(),
    );
    let mut output = lab.api().exec(input).await.expect("started").into_inner();
    output.message().await.expect("no error").expect("a message");
    lab.revoke(&sandbox.node).await.expect("revoked");
    // What the connector does with the connections of a revoked node.
    lab.net.cut(&sandbox.node.parse().expect("name"));
    let ended = async {
        loop {
            if let Err(status) = output.message().await {
                return status;
            }
        }
    };
    let ended = tokio::time::timeout(Duration::from_secs(1), ended).await.expect("at once");
    assert_eq!(reason::<()>(Err(ended)), Reason::OutcomeUnknown);
}

#[tokio::test(start_paused = true)]
async fn calls_to_a_revoked_node_are_refused_at_once_until_it_joins_again() {
    let (lab, _dir) = lab().await;
    let sandbox = lab.create("r1").await.expect("made");
    let run = || super::exec::argv(&sandbox.id, &["true"]);
    let command = async || super::exec::command(&lab, run(), bytes::Bytes::new()).await;
    command().await.expect("it runs");
    lab.revoke(&sandbox.node).await.expect("revoked");
    let refused = |status: &Status| {
        let reason = daemon::status::reason(status);
        assert_eq!(reason, Some(Reason::NodeRevoked), "{status:?}");
        assert_eq!(daemon::status::retry_after(status), None, "nobody repeats it");
        for words in ["is revoked", "sandboxctl node token", "sandboxctl node forget"] {
            assert!(status.message().contains(words), "{words}: {status:?}");
        }
    };
    // Its connections are still open, and then they are not.
    refused(&command().await.expect_err("revoked"));
    lab.holder(&sandbox.id).down();
    lab.until(&sandbox.id, Phase::Unreachable).await;
    refused(&command().await.expect_err("and not only down"));
    let delete = proto::sandbox::v1::DeleteSandboxRequest { id: sandbox.id.clone() };
    refused(&lab.api().delete_sandbox(delete).await.expect_err("it cannot be told"));
    let cordon =
        proto::sandbox::v1::CordonNodeRequest { node: sandbox.node.clone(), why: String::new() };
    refused(&lab.operator().cordon_node(cordon).await.expect_err("it cannot be told"));

    let token = lab.node_token(&sandbox.node).await;
    lab.join(Keys::new().request(&token, &sandbox.node, "")).await.expect("it joins again");
    assert_eq!(reason(command().await), Reason::NodeUnreachable, "it may come back now");
    lab.holder(&sandbox.id).up();
    lab.until(&sandbox.id, Phase::Running).await;
    command().await.expect("it runs");
}

#[tokio::test(start_paused = true)]
async fn only_operators_make_tokens_and_join_is_bounded() {
    let (lab, _dir) = lab().await;
    let blue = token(&lab.store, "blue", "sandbox").await;
    let mut client = EnrolmentServiceClient::with_interceptor(lab.channel(), bearer(&blue));
    let request = CreateNodeTokenRequest { node: "n7".into(), ttl_s: 0 };
    assert_eq!(reason(client.create_node_token(request).await), Reason::ScopeMissing);
    let request = RevokeNodeRequest { node: "n1".into() };
    assert_eq!(reason(client.revoke_node(request).await), Reason::ScopeMissing);
    let large = JoinRequest { token: "x".repeat(5000), ..JoinRequest::default() };
    assert_eq!(reason(lab.join(large).await), Reason::TooLarge);
    let token = lab.node_token("n7").await;
    let keys = Keys::new();
    for address in ["", "n7", "n7:0", ":7445", "n7:x", "a b:1", "0.0.0.0:7445", "[::]:7445"] {
        let request = JoinRequest { address: address.into(), ..keys.request(&token, "n7", "") };
        assert_eq!(reason(lab.join(request).await), Reason::FieldInvalid, "{address}");
    }
    let request = JoinRequest { agent_csr: "x".into(), ..keys.request(&token, "n7", "") };
    assert_eq!(reason(lab.join(request).await), Reason::FieldInvalid);
    lab.join(keys.request(&token, "n7", "")).await.expect("the token is still good");
}
