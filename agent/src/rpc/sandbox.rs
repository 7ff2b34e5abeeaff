//! Calls about one sandbox, and the list.

use daemon::status::Refusal;
use proto::{
    Reason,
    agent::v1::*,
    duration,
    id::{Invalid, SandboxId, SandboxRef},
    lifetime,
    sandbox::v1::Sandbox,
    spec,
    time::timestamp,
    update::Update,
    visibility::Visibility,
};

use super::{Handled, Rpc, convert, status::refusal};
use crate::{
    journal::Record,
    sandbox::{
        Known,
        access::{expose::Reach, links::Wanted},
        lifecycle::resize::Resize,
    },
};

/// Default and largest number of sandboxes on a page.
const PAGE: (u32, u32) = (200, 1000);

impl Rpc {
    pub(super) async fn create(
        &self,
        request: CreateSandboxRequest,
    ) -> Handled<CreateSandboxResponse> {
        let (order, wait) = (convert::order(&request)?, convert::wait(request.wait)?);
        if let Some(node) = &order.spec.node
            && node != self.sandboxes.pve().node()
        {
            return Err(Invalid::new("spec.node", "must be this node, or empty").into());
        }
        let id = order.id;
        let unless_held = |refusal| self.unless_held(&id, refusal);
        self.fence(request.epoch).await.map_err(unless_held)?;
        let made = self.sandboxes.create(order, wait).await;
        let record = made.map_err(refusal).map_err(unless_held)?;
        Ok(CreateSandboxResponse {
            sandbox: Some(self.wire(&record)),
            load: Some(self.reporter.report().await),
        })
    }

    /// Converts a journal failure to an unknown outcome while anything of the creation is here:
    /// then the creation continues or will be undone.
    fn unless_held(&self, id: &SandboxId, refusal: Refusal) -> Refusal {
        let lives = || matches!(self.sandboxes.known(&SandboxRef::Id(*id)), Some(Known::Live(_)));
        if refusal.reason != Reason::StoreFailed || !(lives() || self.sandboxes.busy().contains(id))
        {
            return refusal;
        }
        Refusal::new(Reason::OutcomeUnknown, refusal.message)
    }

    pub(super) async fn cancel(
        &self,
        request: CancelCreateRequest,
    ) -> Handled<CancelCreateResponse> {
        let id: SandboxId = request.sandbox_id.parse()?;
        let attempt = convert::attempt(request.attempt)?;
        self.fence(request.epoch).await?;
        let held =
            self.sandboxes.cancel(&id, attempt, super::SILENCE_MAX).await.map_err(refusal)?;
        Ok(CancelCreateResponse { sandbox: held.map(|record| self.wire(&record)) })
    }

    pub(super) async fn get(&self, request: GetSandboxRequest) -> Handled<GetSandboxResponse> {
        let name: SandboxRef = request.id.parse()?;
        let record = self.sandboxes.get(&name).await.map_err(refusal)?;
        Ok(GetSandboxResponse { sandbox: Some(self.wire(&record)) })
    }

    pub(super) async fn list(
        &self,
        request: ListSandboxesRequest,
    ) -> Handled<ListSandboxesResponse> {
        let size = match request.page_size {
            0 => PAGE.0,
            size if size <= PAGE.1 => size,
            _ => return Err(Invalid::new("page_size", "must be at most 1000").into()),
        };
        let after =
            match request.page_token.as_str() {
                "" => None,
                token => Some(token.parse::<SandboxId>().map_err(|_| {
                    Invalid::new("page_token", "must be the token of the page before")
                })?),
            };
        let limit = usize::try_from(size).unwrap_or(usize::MAX);
        let (page, next) = self.sandboxes.page(after, limit).await.map_err(refusal)?;
        Ok(ListSandboxesResponse {
            sandboxes: page.iter().map(|record| self.wire(record)).collect(),
            next_page_token: next.map(|id| id.to_string()).unwrap_or_default(),
        })
    }

    pub(super) async fn start(
        &self,
        request: StartSandboxRequest,
    ) -> Handled<StartSandboxResponse> {
        let (id, wait) = (request.id.parse()?, convert::wait(request.wait)?);
        self.fence(request.epoch).await?;
        let record = self.sandboxes.start(&id, wait).await.map_err(refusal)?;
        Ok(StartSandboxResponse { sandbox: Some(self.wire(&record)) })
    }

    pub(super) async fn stop(&self, request: StopSandboxRequest) -> Handled<StopSandboxResponse> {
        let (id, wait) = (request.id.parse()?, convert::wait(request.wait)?);
        let grace = lifetime::grace(request.grace)?;
        self.fence(request.epoch).await?;
        let stopped = match grace {
            Some(grace) => self.sandboxes.stop_within(&id, grace, wait).await,
            None => self.sandboxes.stop(&id, wait).await,
        };
        let record = stopped.map_err(refusal)?;
        Ok(StopSandboxResponse { sandbox: Some(self.wire(&record)) })
    }

    pub(super) async fn update(
        &self,
        request: UpdateSandboxRequest,
    ) -> Handled<UpdateSandboxResponse> {
        let id = request.id.parse()?;
        let asked = request.update.ok_or_else(|| Invalid::new("update", "must be given"))?;
        let (update, wait) = (Update::try_from(&asked)?, convert::wait(request.wait)?);
        self.fence(request.epoch).await?;
        let changed = match update.size {
            Some(size) => {
                let resize = Resize { size, revision: update.revision };
                self.sandboxes.resize(&id, resize, wait).await
            }
            None => self.sandboxes.update(&id, update).await,
        };
        let record = changed.map_err(refusal)?;
        Ok(UpdateSandboxResponse { sandbox: Some(self.wire(&record)) })
    }

    pub(super) async fn delete(
        &self,
        request: DeleteSandboxRequest,
    ) -> Handled<DeleteSandboxResponse> {
        let (id, wait) = (request.id.parse()?, convert::wait(request.wait)?);
        self.fence(request.epoch).await?;
        let record = self.sandboxes.delete(&id, wait).await.map_err(refusal)?;
        Ok(DeleteSandboxResponse { sandbox: Some(self.wire(&record)) })
    }

    pub(super) async fn expose(
        &self,
        request: ExposeHttpServiceRequest,
    ) -> Handled<ExposeHttpServiceResponse> {
        let id = request.id.parse()?;
        let service = request.service.ok_or_else(|| Invalid::new("service", "must be given"))?;
        let (name, port) = spec::service(&service.name, service.port)?;
        let default = Visibility::read(request.default_visibility, "default_visibility")?;
        let reach = Reach {
            wanted: Visibility::read(service.visibility, "service.visibility")?,
            // To an older controller every open port is public.
            default: default.unwrap_or(Visibility::Public),
        };
        self.fence(request.epoch).await?;
        let record = self.sandboxes.expose(&id, name, port, reach).await.map_err(refusal)?;
        Ok(ExposeHttpServiceResponse { sandbox: Some(self.wire(&record)) })
    }

    pub(super) async fn hide(
        &self,
        request: HideHttpServiceRequest,
    ) -> Handled<HideHttpServiceResponse> {
        let (id, name) = (request.id.parse()?, request.name.parse()?);
        self.fence(request.epoch).await?;
        let (record, closed) = self.sandboxes.hide(&id, name).await.map_err(refusal)?;
        let closed = closed.iter().map(|(name, port)| convert::closed(name, *port)).collect();
        Ok(HideHttpServiceResponse { sandbox: Some(self.wire(&record)), closed })
    }

    pub(super) async fn access_link(
        &self,
        request: CreateAccessLinkRequest,
    ) -> Handled<CreateAccessLinkResponse> {
        let id = request.id.parse()?;
        let user = Some(request.user).filter(|user| !user.is_empty());
        let wanted = Wanted {
            service: request.service,
            purpose: convert::purpose(request.kind)?,
            life: duration::check("ttl", request.ttl)?,
            user: user.map(|user| user.parse()).transpose()?,
        };
        self.fence(request.epoch).await?;
        let made = self.sandboxes.create_access_link(&id, wanted).await.map_err(refusal)?;
        let expires_ms = made.credential.expires_s.saturating_mul(1000);
        Ok(CreateAccessLinkResponse {
            sandbox: Some(self.wire(&made.record)),
            credential: made.text,
            kind: convert::access_kind(made.credential.purpose).into(),
            expires_at: Some(timestamp(expires_ms)),
            port: made.credential.port.into(),
        })
    }

    pub(super) async fn revoke(
        &self,
        request: RevokeAccessRequest,
    ) -> Handled<RevokeAccessResponse> {
        let id = request.id.parse()?;
        self.fence(request.epoch).await?;
        let revoked = self.sandboxes.revoke_access(&id, request.service).await;
        let (record, port) = revoked.map_err(refusal)?;
        Ok(RevokeAccessResponse { sandbox: Some(self.wire(&record)), port: port.into() })
    }

    pub(super) fn wire(&self, record: &Record) -> Sandbox {
        convert::sandbox(record, self.sandboxes.pve().node())
    }
}
