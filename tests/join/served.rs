//! A controller without nodes in this process, and the token of an operator.

use std::sync::Arc;

use controller::{
    Controller, Parts,
    clock::{SystemClock, SystemRandom},
    config::ApiLimits,
    node::{self, TlsConnector},
    store::{Store, memory::Memory},
    token,
    url::UrlTemplate,
};
use daemon::tls::LiveIdentity;
use proto::{scope::Scopes, token::Format};

/// Starts a controller with this certificate. Returns it with a token that may do everything.
pub(crate) async fn controller(live: &LiveIdentity) -> (Controller, String) {
    let store: Arc<dyn Store> = Arc::new(Memory::new());
    let order = token::Order::new("ops".parse().expect("a team"), Scopes::ALL);
    let issued = token::issue(order, 1);
    let token = issued.text(Format::default());
    store.add_token(issued.token).await.expect("stored");
    let controller = Controller::start(Parts {
        store,
        audit: controller::audit::Audit::off(),
        connector: Arc::new(TlsConnector::new(live.client().expect("a client"))),
        clock: Arc::new(SystemClock),
        random: Arc::new(SystemRandom),
        nodes: node::Options {
            seeds: Vec::new(),
            discover: false,
            agent_port: 7445,
            limits: Default::default(),
        },
        creates: Default::default(),
        events: Default::default(),
        limits: ApiLimits::default(),
        urls: UrlTemplate::new("http://port-{port}-vm-{vmid}.test").expect("template").into(),
    })
    .await
    .expect("a controller");
    (controller, token)
}
