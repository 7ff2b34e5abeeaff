//! `NameService` of the fake agent: keeps what it is told in memory.

use std::collections::BTreeMap;

use proto::{
    agent::v1::{name_service_server::NameService, *},
    host::FullName,
};
use tonic::{Request, Response, Status};

use super::{FakeAgent, service::Service};

/// Names that the agent was told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    /// Whether host names by name are answered.
    pub enabled: bool,
    /// Id of each named sandbox.
    pub ids: BTreeMap<String, String>,
    /// Names in all requests, set and removed.
    pub sent: usize,
    /// Number of requests.
    pub requests: usize,
}

impl FakeAgent {
    /// Returns the names that it was told; `None` before.
    pub fn names(&self) -> Option<Names> {
        self.world.lock().names.clone()
    }

    /// Forgets the names, as with the loss of its disk.
    pub fn forget_names(&self) {
        self.world.lock().names = None;
    }
}

#[tonic::async_trait]
impl NameService for Service {
    async fn set_names(
        &self,
        request: Request<SetNamesRequest>,
    ) -> Result<Response<SetNamesResponse>, Status> {
        let request = request.into_inner();
        if self.0.world.lock().faults.knows_no_names {
            return Err(Status::unimplemented("there is no such service"));
        }
        self.0.check_epoch(request.epoch)?;
        let mut world = self.0.world.lock();
        let names = world.names.get_or_insert_default();
        names.enabled = request.enabled;
        names.requests += 1;
        names.sent += request.set.len() + request.removed.len();
        let parse = |text: &str| text.parse::<FullName>().expect("a name of a host");
        if let Some(NameRange { after, until }) = &request.replaced {
            let is_in = |name: &FullName| {
                (after.is_empty() || *name > parse(after))
                    && (until.is_empty() || *name <= parse(until))
            };
            names.ids.retain(|name, _| !is_in(&parse(name)));
        }
        request.removed.iter().for_each(|name| drop(names.ids.remove(name)));
        names.ids.extend(request.set.into_iter().map(|named| (named.name, named.sandbox_id)));
        let digest = |(name, id): (&String, &String)| {
            parse(name).digest(&id.parse().expect("a sandbox's id"))
        };
        let digest = names.ids.iter().map(digest).fold(0, |all, one| all ^ one);
        Ok(Response::new(SetNamesResponse { digest }))
    }
}
