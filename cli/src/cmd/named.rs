//! The sandboxes that a verb names, all in one place, so that each can be named in every way.

use super::{
    Operator, User, Verb, admin::Admin, audit::AuditVerb, cp, ingress::Ingress, port::Port,
};
use crate::{client::Controller, failure::Failure, resolve};

/// Replaces what the user typed by names that the API takes. `connect` is called only where that
/// needs a controller.
///
/// # Errors
/// When a name means no sandbox or several.
pub(super) async fn resolve(
    verb: &mut Verb,
    connect: impl Fn() -> Result<Controller, Failure>,
) -> Result<(), Failure> {
    for id in of(verb) {
        if resolve::is_needed(id) {
            *id = resolve::resolve(&connect()?, id).await?;
        }
    }
    Ok(())
}

fn of(verb: &mut Verb) -> Vec<&mut String> {
    match verb {
        Verb::User(verb) => of_user(verb),
        Verb::Operator(verb) => of_operator(verb),
    }
}

fn of_user(verb: &mut User) -> Vec<&mut String> {
    match verb {
        User::Get(args) => vec![&mut args.sandbox.id],
        User::Exec(args) => vec![&mut args.sandbox.id],
        User::Shell(args) => vec![&mut args.id],
        User::Ssh(args) => vec![&mut args.sandbox.id],
        User::Wait(args) => vec![&mut args.sandbox.id],
        User::Inspect(args) => args.sandboxes.ids.iter_mut().collect(),
        User::Ps(args) => vec![&mut args.sandbox.id],
        User::Logs(args) => vec![&mut args.sandbox.id],
        User::Attach(args) => vec![&mut args.sandbox.id],
        User::Console(args) => vec![&mut args.sandbox.id],
        User::Kill(args) => vec![&mut args.sandbox.id],
        User::Cp(args) => {
            let places = [&mut args.source, &mut args.destination];
            places.into_iter().filter_map(cp::Place::sandbox).collect()
        }
        User::Start(args) => args.sandboxes.ids.iter_mut().collect(),
        User::Stop(args) => args.asked.sandboxes.ids.iter_mut().collect(),
        User::Rename(args) => vec![&mut args.sandbox.id],
        User::Resize(args) => vec![&mut args.sandbox.id],
        User::Set(args) => vec![&mut args.sandbox.id],
        User::Rm(args) => args.sandboxes.ids.iter_mut().collect(),
        User::Pause(args) => args.sandboxes.ids.iter_mut().collect(),
        User::Resume(args) => args.sandboxes.ids.iter_mut().collect(),
        User::Top(args) => args.ids.iter_mut().collect(),
        User::WakeOn(args) => vec![&mut args.sandbox.id],
        User::Egress(args) => vec![&mut args.sandbox.id],
        User::Lifetime(args) => vec![&mut args.sandbox.id],
        User::Expose(args) => vec![&mut args.sandbox.id],
        User::Hide(args) => vec![&mut args.sandbox.id],
        User::Link(args) => vec![&mut args.sandbox.id],
        User::Revoke(args) => vec![&mut args.sandbox.id],
        User::Url(args) => vec![&mut args.sandbox.id],
        User::PortForward(args) => vec![&mut args.sandbox.id],
        User::Port(Port::Ls(args)) => vec![&mut args.sandbox.id],
        User::Ingress(Ingress::Test(args)) => vec![&mut args.sandbox.id],
        User::Watch(args) => vec![&mut args.sandbox.id],
        User::Use(args) => args.id.iter_mut().collect(),
        User::Explain(args) => args.id.iter_mut().collect(),
        User::Events(args) => args.id.iter_mut().collect(),
        User::Run(_)
        | User::Create(_)
        | User::Ls(_)
        | User::Snapshot(_)
        | User::SshKey(_)
        | User::SshConfig(_)
        | User::Prune(_)
        | User::Compare(_)
        | User::Login(_)
        | User::Context(_)
        | User::Doctor
        | User::Version
        | User::Completion(_)
        | User::Complete(_)
        | User::Man(_) => Vec::new(),
    }
}

fn of_operator(verb: &mut Operator) -> Vec<&mut String> {
    match verb {
        Operator::Release(args) | Operator::Admin(Admin::Release(args)) => vec![&mut args.id],
        Operator::Audit(AuditVerb::Ls(args)) => args.sandbox.iter_mut().collect(),
        Operator::Nodes(_)
        | Operator::Fsck
        | Operator::Gc(_)
        | Operator::Recover(_)
        | Operator::Adopt(_)
        | Operator::Cordon(_)
        | Operator::Uncordon(_)
        | Operator::Drain(_)
        | Operator::Node(_)
        | Operator::Token(_)
        | Operator::Team(_)
        | Operator::Audit(_)
        | Operator::Admin(_) => Vec::new(),
    }
}
