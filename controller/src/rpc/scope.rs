//! Access rules. Every method has an entry; one without is refused. A test compares this table with
//! the descriptors, so that a new method cannot be forgotten.

/// Required credentials of a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// None: the answer reveals nothing about anybody and is given at once, or the request itself brings
    /// its authority.
    Open,
    /// Any valid token: the answer reveals nothing about anybody, but the call takes a permit for
    /// as long as the caller likes.
    Token,
    /// A token with this scope.
    Scope(&'static str),
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
    /// Required credentials.
    pub(super) need: Need,
    /// Duration of a call.
    pub(super) shape: Shape,
}

/// Scope to use the sandboxes of the token's own team. Every token has it.
pub const SANDBOX: &str = "sandbox";
/// Scope to inspect and manage nodes.
pub const OPERATOR: &str = "operator";
/// All scopes.
pub const ALL: &[&str] = &[SANDBOX, OPERATOR];

use Need::{Open, Scope, Token};
use Shape::{Stream, Unary};

const TABLE: &[(&str, Need, Shape)] = &[
    ("/grpc.health.v1.Health/Check", Open, Unary),
    ("/grpc.health.v1.Health/Watch", Token, Stream),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Token, Stream),
    ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", Token, Stream),
    // The one-time token in the request is the authority.
    ("/sandbox.v1.EnrolmentService/Join", Open, Unary),
    ("/sandbox.v1.EnrolmentService/CreateNodeToken", Scope(OPERATOR), Unary),
    ("/sandbox.v1.EnrolmentService/RevokeNode", Scope(OPERATOR), Unary),
    ("/sandbox.v1.OperatorService/Fsck", Scope(OPERATOR), Unary),
    ("/sandbox.v1.OperatorService/GetVersion", Scope(SANDBOX), Unary),
    ("/sandbox.v1.OperatorService/ListNodes", Scope(OPERATOR), Unary),
    ("/sandbox.v1.OperatorService/WatchAllEvents", Scope(OPERATOR), Stream),
    ("/sandbox.v1.SandboxService/CreateSandbox", Scope(SANDBOX), Unary),
    ("/sandbox.v1.SandboxService/DeleteSandbox", Scope(SANDBOX), Unary),
    ("/sandbox.v1.SandboxService/DownloadArchive", Scope(SANDBOX), Stream),
    ("/sandbox.v1.SandboxService/Exec", Scope(SANDBOX), Stream),
    ("/sandbox.v1.SandboxService/ExecCommand", Scope(SANDBOX), Unary),
    ("/sandbox.v1.SandboxService/ExplainPlacement", Scope(SANDBOX), Unary),
    ("/sandbox.v1.SandboxService/ExposeHttpService", Scope(SANDBOX), Unary),
    ("/sandbox.v1.SandboxService/GetSandbox", Scope(SANDBOX), Unary),
    ("/sandbox.v1.SandboxService/GetUsage", Scope(SANDBOX), Unary),
    ("/sandbox.v1.SandboxService/HideHttpService", Scope(SANDBOX), Unary),
    ("/sandbox.v1.SandboxService/ListDir", Scope(SANDBOX), Unary),
    ("/sandbox.v1.SandboxService/ListExecs", Scope(SANDBOX), Unary),
    ("/sandbox.v1.SandboxService/ListSandboxes", Scope(SANDBOX), Unary),
    ("/sandbox.v1.SandboxService/ListSnapshots", Scope(SANDBOX), Unary),
    ("/sandbox.v1.SandboxService/PauseSandbox", Scope(SANDBOX), Unary),
    ("/sandbox.v1.SandboxService/ReadFile", Scope(SANDBOX), Stream),
    ("/sandbox.v1.SandboxService/RemoveFile", Scope(SANDBOX), Unary),
    ("/sandbox.v1.SandboxService/ResizeExec", Scope(SANDBOX), Unary),
    ("/sandbox.v1.SandboxService/ResumeSandbox", Scope(SANDBOX), Unary),
    ("/sandbox.v1.SandboxService/UpdateSandbox", Scope(SANDBOX), Unary),
    ("/sandbox.v1.SandboxService/GetOrCreateSandbox", Scope(SANDBOX), Unary),
    ("/sandbox.v1.SandboxService/PruneSandboxes", Scope(SANDBOX), Unary),
    ("/sandbox.v1.SandboxService/CompareSandboxes", Scope(SANDBOX), Unary),
    ("/sandbox.v1.OperatorService/CollectGarbage", Scope(OPERATOR), Unary),
    ("/sandbox.v1.OperatorService/RecoverSandbox", Scope(OPERATOR), Unary),
    ("/sandbox.v1.OperatorService/AdoptSandbox", Scope(OPERATOR), Unary),
    ("/sandbox.v1.OperatorService/ReleaseSandbox", Scope(OPERATOR), Unary),
    ("/sandbox.v1.OperatorService/ForgetNode", Scope(OPERATOR), Unary),
    ("/sandbox.v1.OperatorService/CordonNode", Scope(OPERATOR), Unary),
    ("/sandbox.v1.OperatorService/UncordonNode", Scope(OPERATOR), Unary),
    ("/sandbox.v1.OperatorService/DrainNode", Scope(OPERATOR), Unary),
    ("/sandbox.v1.SandboxService/SignalExec", Scope(SANDBOX), Unary),
    ("/sandbox.v1.SandboxService/StartSandbox", Scope(SANDBOX), Unary),
    ("/sandbox.v1.SandboxService/StatFile", Scope(SANDBOX), Unary),
    ("/sandbox.v1.SandboxService/StopSandbox", Scope(SANDBOX), Unary),
    ("/sandbox.v1.SandboxService/StreamExec", Scope(SANDBOX), Stream),
    ("/sandbox.v1.SandboxService/UploadArchive", Scope(SANDBOX), Stream),
    ("/sandbox.v1.SandboxService/WatchEvents", Scope(SANDBOX), Stream),
    ("/sandbox.v1.SandboxService/WatchSandbox", Scope(SANDBOX), Stream),
    ("/sandbox.v1.SandboxService/WatchSandboxes", Scope(SANDBOX), Stream),
    ("/sandbox.v1.SandboxService/WriteExecStdin", Scope(SANDBOX), Unary),
    ("/sandbox.v1.SandboxService/WriteFiles", Scope(SANDBOX), Unary),
];

/// Returns the rules of a path; `None` when there is no such method.
pub(super) fn method(path: &str) -> Option<Method> {
    let row = TABLE.iter().find(|(known, ..)| *known == path);
    row.map(|(_, need, shape)| Method { need: *need, shape: *shape })
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
            assert_eq!(matches!(need, Scope(_)), ours, "{path}");
            // A call that is open to everybody must end by itself.
            assert!(*need != Open || *shape == Unary, "{path}");
        }
    }

    #[test]
    fn only_a_health_check_and_a_join_need_no_token() {
        let open = TABLE.iter().filter(|(_, need, _)| *need == Open).map(|(path, ..)| *path);
        assert_eq!(
            open.collect::<Vec<_>>(),
            ["/grpc.health.v1.Health/Check", "/sandbox.v1.EnrolmentService/Join"]
        );
    }
}
