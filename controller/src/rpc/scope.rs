//! Access rules. Every method has an entry; one without is refused. A test compares this table with
//! the descriptors, so that a new method cannot be forgotten.

use proto::scope::Scope::{self, Admin, Exec, Manage, Read};

/// Required credentials of a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// None: the answer reveals nothing about anybody and is given at once.
    Open,
    /// No token of a team: the request itself brings its authority, a one-time token.
    OneTime,
    /// Any valid token: the answer reveals nothing about anybody, but the call takes a permit for
    /// as long as the caller likes.
    Token,
    /// A token with this scope.
    Scope(Scope),
}

/// Duration of a call. The two shapes have separate limits, so that the streams of a team leave
/// room for its other calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// One message each way: ends soon.
    Unary,
    /// A stream in one direction or both: lasts as long as its ends want.
    Stream,
}

/// Rules of a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Method {
    /// Name without its service, which no other recorded method has.
    pub(super) name: &'static str,
    /// Required credentials.
    pub(super) need: Need,
    /// Duration of a call.
    pub(super) shape: Shape,
}

impl Method {
    /// Whether the audit log records its calls: all that change or enter a sandbox, and all of operators.
    pub(super) const fn is_recorded(self) -> bool {
        match self.need {
            Need::Open | Need::Token | Need::Scope(Read | Scope::Unspecified) => false,
            Need::OneTime | Need::Scope(Exec | Manage | Admin) => true,
        }
    }
}

use Need::{OneTime, Open, Token};
use Shape::{Stream, Unary};

/// Builds the need of a scope.
const fn of(scope: Scope) -> Need {
    Need::Scope(scope)
}

const TABLE: &[(&str, Need, Shape)] = &[
    ("/grpc.health.v1.Health/Check", Open, Unary),
    ("/grpc.health.v1.Health/Watch", Token, Stream),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Token, Stream),
    ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", Token, Stream),
    ("/sandbox.v1.SandboxService/CompareSandboxes", of(Read), Unary),
    ("/sandbox.v1.SandboxService/ExplainPlacement", of(Read), Unary),
    ("/sandbox.v1.SandboxService/GetSandbox", of(Read), Unary),
    ("/sandbox.v1.SandboxService/GetUsage", of(Read), Unary),
    ("/sandbox.v1.SandboxService/ListPorts", of(Read), Unary),
    ("/sandbox.v1.SandboxService/ListSandboxes", of(Read), Unary),
    ("/sandbox.v1.SandboxService/ListSnapshots", of(Read), Unary),
    ("/sandbox.v1.SandboxService/WatchEvents", of(Read), Stream),
    ("/sandbox.v1.SandboxService/WatchSandbox", of(Read), Stream),
    ("/sandbox.v1.SandboxService/WatchSandboxes", of(Read), Stream),
    ("/sandbox.v1.SandboxService/DownloadArchive", of(Exec), Stream),
    ("/sandbox.v1.SandboxService/Exec", of(Exec), Stream),
    ("/sandbox.v1.SandboxService/ExecCommand", of(Exec), Unary),
    ("/sandbox.v1.SandboxService/Forward", of(Exec), Stream),
    ("/sandbox.v1.SandboxService/ForwardListen", of(Exec), Stream),
    ("/sandbox.v1.SandboxService/ListDir", of(Exec), Unary),
    ("/sandbox.v1.SandboxService/ListExecs", of(Exec), Unary),
    ("/sandbox.v1.SandboxService/ReadFile", of(Exec), Stream),
    ("/sandbox.v1.SandboxService/RemoveFile", of(Exec), Unary),
    ("/sandbox.v1.SandboxService/ResizeExec", of(Exec), Unary),
    ("/sandbox.v1.SandboxService/SignalExec", of(Exec), Unary),
    ("/sandbox.v1.SandboxService/StatFile", of(Exec), Unary),
    ("/sandbox.v1.SandboxService/StreamExec", of(Exec), Stream),
    ("/sandbox.v1.SandboxService/UploadArchive", of(Exec), Stream),
    ("/sandbox.v1.SandboxService/WriteExecStdin", of(Exec), Unary),
    ("/sandbox.v1.SandboxService/WriteFiles", of(Exec), Unary),
    // A credential lets others in, and outlives the token that it was made with.
    ("/sandbox.v1.SandboxService/CreateAccessLink", of(Manage), Unary),
    ("/sandbox.v1.SandboxService/CreateSandbox", of(Manage), Unary),
    ("/sandbox.v1.SandboxService/DeleteSandbox", of(Manage), Unary),
    ("/sandbox.v1.SandboxService/ExposeHttpService", of(Manage), Unary),
    ("/sandbox.v1.SandboxService/GetOrCreateSandbox", of(Manage), Unary),
    ("/sandbox.v1.SandboxService/HideHttpService", of(Manage), Unary),
    ("/sandbox.v1.SandboxService/PauseSandbox", of(Manage), Unary),
    ("/sandbox.v1.SandboxService/PruneSandboxes", of(Manage), Unary),
    ("/sandbox.v1.SandboxService/ResumeSandbox", of(Manage), Unary),
    ("/sandbox.v1.SandboxService/RevokeAccess", of(Manage), Unary),
    ("/sandbox.v1.SandboxService/StartSandbox", of(Manage), Unary),
    ("/sandbox.v1.SandboxService/StopSandbox", of(Manage), Unary),
    ("/sandbox.v1.SandboxService/UpdateSandbox", of(Manage), Unary),
    ("/sandbox.v1.OperatorService/GetTeam", of(Read), Unary),
    ("/sandbox.v1.OperatorService/GetVersion", of(Read), Unary),
    ("/sandbox.v1.OperatorService/ListSshKeys", of(Read), Unary),
    ("/sandbox.v1.OperatorService/AddSshKey", of(Manage), Unary),
    ("/sandbox.v1.OperatorService/RemoveSshKey", of(Manage), Unary),
    ("/sandbox.v1.OperatorService/AdoptSandbox", of(Admin), Unary),
    ("/sandbox.v1.OperatorService/CollectGarbage", of(Admin), Unary),
    ("/sandbox.v1.OperatorService/CordonNode", of(Admin), Unary),
    ("/sandbox.v1.OperatorService/CreateToken", of(Admin), Unary),
    ("/sandbox.v1.OperatorService/DrainNode", of(Admin), Unary),
    ("/sandbox.v1.OperatorService/ExportAudit", of(Admin), Stream),
    ("/sandbox.v1.OperatorService/ForgetNode", of(Admin), Unary),
    ("/sandbox.v1.OperatorService/Fsck", of(Admin), Unary),
    ("/sandbox.v1.OperatorService/ListAudit", of(Admin), Stream),
    ("/sandbox.v1.OperatorService/ListNodes", of(Admin), Unary),
    ("/sandbox.v1.OperatorService/ListTeams", of(Admin), Unary),
    ("/sandbox.v1.OperatorService/ListTokens", of(Admin), Unary),
    ("/sandbox.v1.OperatorService/RecoverSandbox", of(Admin), Unary),
    ("/sandbox.v1.OperatorService/ReleaseSandbox", of(Admin), Unary),
    ("/sandbox.v1.OperatorService/RevokeToken", of(Admin), Unary),
    ("/sandbox.v1.OperatorService/UncordonNode", of(Admin), Unary),
    ("/sandbox.v1.OperatorService/UpdateTeam", of(Admin), Unary),
    ("/sandbox.v1.OperatorService/VerifyAudit", of(Admin), Unary),
    ("/sandbox.v1.OperatorService/WatchAllEvents", of(Admin), Stream),
    ("/sandbox.v1.EnrolmentService/Join", OneTime, Unary),
    ("/sandbox.v1.EnrolmentService/CreateNodeToken", of(Admin), Unary),
    ("/sandbox.v1.EnrolmentService/RevokeNode", of(Admin), Unary),
];

/// Returns the rules of a path; `None` when there is no such method.
pub(super) fn method(path: &str) -> Option<Method> {
    let row = TABLE.iter().find(|(known, ..)| *known == path);
    row.map(|(path, need, shape)| Method {
        name: path.rsplit_once('/').map_or("", |(_, name)| name),
        need: *need,
        shape: *shape,
    })
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use prost_types::FileDescriptorSet;

    use super::*;

    #[test]
    fn scope_table_matches_the_methods() {
        let mut methods = Vec::new();
        let ours = FileDescriptorSet::decode(proto::DESCRIPTORS).expect("descriptors");
        let health = FileDescriptorSet::decode(tonic_health::pb::FILE_DESCRIPTOR_SET);
        let served = ours.file.into_iter().filter(|file| file.package() == "sandbox.v1");
        for file in served.chain(health.expect("descriptors").file) {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    let streams = method.client_streaming() || method.server_streaming();
                    methods.push((path, if streams { Stream } else { Unary }));
                }
            }
        }
        for (path, shape) in &methods {
            let known = method(path).unwrap_or_else(|| panic!("{path} has no entry"));
            assert_eq!(known.shape, *shape, "{path}");
        }
        for (path, need, shape) in TABLE {
            let reflection = path.starts_with("/grpc.reflection.");
            assert!(reflection || methods.iter().any(|(known, _)| known == path), "{path} is none");
            let ours = path.starts_with("/sandbox.v1.") && !path.ends_with("/Join");
            assert_eq!(matches!(need, Need::Scope(_)), ours, "{path}");
            // A call that is open to everybody must end by itself.
            assert!(!matches!(need, Open | OneTime) || *shape == Unary, "{path}");
        }
    }

    #[test]
    fn calls_that_change_or_enter_and_those_of_operators_are_recorded() {
        let mut names = std::collections::BTreeSet::new();
        for (path, need, _) in TABLE {
            let method = method(path).expect("an entry");
            let (service, name) = path.rsplit_once('/').expect("a path");
            let looks = ["Get", "List", "Watch", "Explain", "Compare", "Check", "ServerReflection"];
            let looks = looks.iter().any(|start| name.starts_with(start));
            // Whatever only looks, and does so from outside of a sandbox, for a team.
            let outside = matches!(need, Open | Token | Need::Scope(Read));
            assert_eq!(method.is_recorded(), !outside, "{path}");
            assert!(looks && name != "GetOrCreateSandbox" || !outside, "{path} is not recorded");
            assert!(!service.ends_with("EnrolmentService") || method.is_recorded(), "{path}");
            assert!(!method.is_recorded() || names.insert(name), "two methods are named {name}");
        }
        let recorded = |path: &str| method(path).expect("an entry").is_recorded();
        assert!(recorded("/sandbox.v1.EnrolmentService/Join"));
        assert!(recorded("/sandbox.v1.SandboxService/ListDir"), "it enters a sandbox");
        assert!(recorded("/sandbox.v1.OperatorService/ListAudit"));
        assert!(!recorded("/sandbox.v1.SandboxService/ListSandboxes"));
    }

    #[test]
    fn only_a_health_check_and_a_join_need_no_token() {
        let open = TABLE
            .iter()
            .filter(|(_, need, _)| matches!(need, Open | OneTime))
            .map(|(path, ..)| *path);
        assert_eq!(
            open.collect::<Vec<_>>(),
            ["/grpc.health.v1.Health/Check", "/sandbox.v1.EnrolmentService/Join"]
        );
    }
}
