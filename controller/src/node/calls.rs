//! Calls of `agent.v1`, and what a missing answer of each means.

/// Method of `agent.v1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the calls of proto/agent/v1/agent.proto, which describes them")]
pub enum Call {
    Hello,
    CreateSandbox,
    CancelCreate,
    GetSandbox,
    ListSandboxes,
    StartSandbox,
    StopSandbox,
    PauseSandbox,
    ResumeSandbox,
    SetWakeOn,
    SetLifetime,
    DeleteSandbox,
    Exec,
    ControlExec,
    ListExecs,
    Files,
    GetUsage,
    ExposeHttpService,
    HideHttpService,
    GetLoad,
    Watch,
    CollectGarbage,
    RecoverSandbox,
    SetIntake,
    Reserve,
    GiveBack,
    AdoptSandbox,
    ExportSandbox,
    ImportSandbox,
    ReleaseSandbox,
    Check,
}

/// Likely cause of a missing answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Silence {
    /// The agent: nothing else is needed for an answer. Its node gets no new work for a while.
    Agent,
    /// Perhaps a sandbox: the answer waits for a container, for a process in it, or for the holder
    /// of a lock on it. A tenant can delay it at will, so it says nothing about the node.
    Sandbox,
}

impl Call {
    /// Every method.
    pub const ALL: &[Self] = &[
        Self::Hello,
        Self::CreateSandbox,
        Self::CancelCreate,
        Self::GetSandbox,
        Self::ListSandboxes,
        Self::StartSandbox,
        Self::StopSandbox,
        Self::PauseSandbox,
        Self::ResumeSandbox,
        Self::SetWakeOn,
        Self::SetLifetime,
        Self::DeleteSandbox,
        Self::Exec,
        Self::ControlExec,
        Self::ListExecs,
        Self::Files,
        Self::GetUsage,
        Self::ExposeHttpService,
        Self::HideHttpService,
        Self::GetLoad,
        Self::Watch,
        Self::CollectGarbage,
        Self::RecoverSandbox,
        Self::SetIntake,
        Self::Reserve,
        Self::GiveBack,
        Self::AdoptSandbox,
        Self::ExportSandbox,
        Self::ImportSandbox,
        Self::ReleaseSandbox,
        Self::Check,
    ];

    /// Returns the likely cause of a missing answer.
    pub fn silence(self) -> Silence {
        match self {
            // Answered from memory and the journal, or after the wait that the caller named. Only
            // the creation concerns a sandbox, and no tenant has been in it yet.
            Self::Hello
            | Self::Watch
            | Self::GetLoad
            | Self::ListSandboxes
            | Self::GetSandbox
            | Self::SetIntake
            | Self::Reserve
            | Self::GiveBack
            | Self::CreateSandbox => Silence::Agent,
            // Commands, files and measurements in a sandbox.
            Self::Exec
            | Self::ControlExec
            | Self::ListExecs
            | Self::Files
            | Self::GetUsage
            | Self::ExposeHttpService
            | Self::HideHttpService
            // Changes of a container: they wait for its processes, and for each other.
            | Self::CancelCreate
            | Self::StartSandbox
            | Self::StopSandbox
            | Self::PauseSandbox
            | Self::ResumeSandbox
            | Self::DeleteSandbox
            | Self::SetWakeOn
            | Self::SetLifetime
            | Self::RecoverSandbox
            | Self::AdoptSandbox
            | Self::ReleaseSandbox
            | Self::ExportSandbox
            | Self::ImportSandbox
            // Inspections of every container of the node.
            | Self::CollectGarbage
            | Self::Check => Silence::Sandbox,
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    #[test]
    fn every_call_of_the_agent_has_its_kind() {
        let files =
            prost_types::FileDescriptorSet::decode(proto::DESCRIPTORS).expect("descriptors");
        let services = files.file.iter().flat_map(|file| &file.service);
        let agent = services.filter(|service| service.name() == "AgentService");
        let mut methods: Vec<_> =
            agent.flat_map(|service| &service.method).map(|m| m.name().to_owned()).collect();
        let mut known: Vec<_> = Call::ALL.iter().map(|call| format!("{call:?}")).collect();
        known.sort();
        methods.sort();
        assert_eq!(known, methods);
    }
}
