//! `NameService`: the controller tells which sandboxes have which names.

use std::sync::Arc;

use daemon::status::Refusal;
use proto::{
    Reason,
    agent::v1::{name_service_server::NameService, *},
    host::{CHANGES_MAX, FullName},
    id::Invalid,
};
use tokio::task::spawn_blocking;
use tonic::{Request, Status};

use super::{Answer, Handled, Rpc};
use crate::name_directory::{NameDirectory, Range, Update};

#[tonic::async_trait]
impl NameService for Rpc {
    async fn set_names(&self, request: Request<SetNamesRequest>) -> Answer<SetNamesResponse> {
        let directory = self.names.get().cloned();
        let directory =
            directory.ok_or_else(|| Status::unimplemented("this agent has no names"))?;
        self.call(self.take_names(directory, request.into_inner())).await
    }
}

impl Rpc {
    /// Keeps the controller's directory of names here. Called once; without it the call is unknown.
    pub fn keep_names(&self, directory: Arc<NameDirectory>) {
        drop(self.names.set(directory));
    }

    async fn take_names(
        &self,
        directory: Arc<NameDirectory>,
        request: SetNamesRequest,
    ) -> Handled<SetNamesResponse> {
        self.fence(request.epoch).await?;
        let update = checked(request)?;
        let applied = spawn_blocking(move || directory.apply(&update)).await;
        let failed = |error: &dyn std::fmt::Display| {
            Refusal::new(Reason::StoreFailed, format!("the directory of names: {error}"))
        };
        let digest = applied.map_err(|error| failed(&error))?.map_err(|error| failed(&error))?;
        Ok(SetNamesResponse { digest })
    }
}

fn checked(request: SetNamesRequest) -> Result<Update, Invalid> {
    if request.removed.len() + request.set.len() > CHANGES_MAX {
        let why = format!("must be at most {CHANGES_MAX} names, with those of `removed`");
        return Err(Invalid::new("set", why));
    }
    let end = |text: &str| (!text.is_empty()).then(|| text.parse::<FullName>()).transpose();
    let range = |range: NameRange| {
        Ok::<_, Invalid>(Range { after: end(&range.after)?, until: end(&range.until)? })
    };
    let named = |named: NamedSandbox| Ok((named.name.parse()?, named.sandbox_id.parse()?));
    Ok(Update {
        is_enabled: request.enabled,
        replaced: request.replaced.map(range).transpose()?,
        removed: request.removed.iter().map(|name| name.parse()).collect::<Result<_, _>>()?,
        set: request.set.into_iter().map(named).collect::<Result<_, Invalid>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_with_a_bad_or_too_many_names_is_refused() {
        let bad = || "Box--red".to_owned();
        let range = |after: String, until: String| SetNamesRequest {
            replaced: Some(NameRange { after, until }),
            ..SetNamesRequest::default()
        };
        let named = |name: &str, id: &str| SetNamesRequest {
            set: vec![NamedSandbox { name: name.into(), sandbox_id: id.into() }],
            ..SetNamesRequest::default()
        };
        let too_many = vec!["box--red".to_owned(); CHANGES_MAX + 1];
        for request in [
            range(bad(), String::new()),
            range(String::new(), bad()),
            named("Box--red", "pvelxc-01jd0000000000000000000000"),
            named("box--red", "100001"),
            SetNamesRequest { removed: vec![bad()], ..SetNamesRequest::default() },
            SetNamesRequest { removed: too_many, ..SetNamesRequest::default() },
        ] {
            checked(request.clone()).expect_err(&format!("{request:?}"));
        }
        let good = named("box--red", "pvelxc-01jd0000000000000000000000");
        assert_eq!(checked(good).expect("valid").set.len(), 1);
    }
}
