//! Space and volumes of storages. Directories are read; other storages need a tool, whose answer is
//! cached for a while.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::{Path, PathBuf},
    time::Duration,
};

use daemon::sync::Mutex;
use futures_util::future::join_all;
use nix::sys::statfs::{FsType, statfs};
use proto::id::Vmid;
use tokio::time::Instant;

use super::{CALL, Host, unread};
use crate::{
    pve::{
        CloneSite, ErrorKind, Result, StorageRoom, pmxcfs,
        storage::{self, Place, Storage},
        volume,
    },
    run::Program,
};

const LVS: &str = "/usr/sbin/lvs";
const ZFS: &str = "/usr/sbin/zfs";

/// Magic number of ZFS in statfs(2), which counts a dataset, not its pool: ZFS is asked instead.
const ZFS_MAGIC: FsType = FsType(0x2FC1_2FC1);

#[derive(Debug, Default)]
pub(super) struct Rooms(Mutex<HashMap<String, (Instant, StorageRoom)>>);

impl Rooms {
    fn get(&self, storage: &str) -> Option<StorageRoom> {
        let rooms = self.0.lock();
        rooms.get(storage).filter(|(until, _)| *until > Instant::now()).map(|(_, room)| *room)
    }

    fn keep(&self, storage: &str, room: StorageRoom, age: Duration) {
        let mut rooms = self.0.lock();
        rooms.insert(storage.to_owned(), (Instant::now() + age, room));
    }
}

impl Host {
    /// Storages that can hold containers of this node.
    pub(super) async fn storages(&self) -> Result<Vec<Storage>> {
        let path = self.places.root.join(pmxcfs::STORAGES);
        let bytes = self.files.read(path).await.map_err(|error| unread(&error))?;
        let bytes =
            bytes.ok_or_else(|| ErrorKind::NoQuorum("there is no storage.cfg".to_owned()))?;
        let mut storages = storage::parse(&String::from_utf8_lossy(&bytes));
        storages.retain(|storage| storage.holds_containers(&self.node));
        Ok(storages)
    }

    pub(super) async fn storage_room(&self, template: Vmid) -> Result<StorageRoom> {
        let config = self.config(template).await?.ok_or_else(|| self.missing(template))?;
        let name = config.storage().unwrap_or("");
        if let Some(room) = self.rooms.get(name) {
            return Ok(room);
        }
        let storages = self.storages().await?;
        let found = storages.iter().find(|storage| storage.name == name);
        let storage = found.ok_or_else(|| {
            ErrorKind::Failed(format!("storage '{name}' holds no containers on this node"))
        })?;
        let (room, age) = match storage.place() {
            Place::Flat(path) => self.dataset_room(storage, &path).await?,
            Place::Images(path) => (self.file_system_room(path).await?.0, Duration::from_secs(1)),
            Place::Thin { group, pool } => {
                let volume = format!("{group}/{pool}");
                let options = ["--noheadings", "--units", "b", "--nosuffix", "-o"];
                let columns = ["lv_size,data_percent,metadata_percent", volume.as_str()];
                let text = self.tool(LVS, options.into_iter().chain(columns)).await?;
                (storage::parse_thin_room(&text), Duration::from_secs(5))
            }
            Place::Other => {
                let pvesm = self.places.pvesm.clone();
                let text = self.tool(pvesm, ["status", "--storage", name]).await?;
                (storage::parse_pvesm_room(&text, name), Duration::from_secs(60))
            }
        };
        let unknown = || ErrorKind::Failed(format!("the room on storage '{name}' is not known"));
        let room = room.ok_or_else(unknown)?;
        self.rooms.keep(name, room, age);
        Ok(room)
    }

    async fn dataset_room(
        &self,
        storage: &Storage,
        path: &Path,
    ) -> Result<(Option<StorageRoom>, Duration)> {
        let (room, kind) = self.file_system_room(path.to_owned()).await?;
        let pool = storage.properties.get("pool").filter(|_| kind == ZFS_MAGIC);
        let Some(pool) = pool else { return Ok((room, Duration::from_secs(1))) };
        let text = self.tool(ZFS, ["list", "-Hp", "-o", "used,available", pool]).await?;
        Ok((storage::parse_zfs_room(&text), Duration::from_secs(5)))
    }

    async fn file_system_room(&self, path: PathBuf) -> Result<(Option<StorageRoom>, FsType)> {
        let read = self.files.blocking(move || Ok(statfs(&path)?));
        let found = read.await.map_err(|error| ErrorKind::Failed(format!("statfs: {error}")))?;
        let block = u64::try_from(found.block_size()).unwrap_or(0);
        let room = StorageRoom::new(found.blocks_available() * block, found.blocks() * block);
        Ok((Some(room), found.filesystem_type()))
    }

    /// Volumes of this vmid, on any storage.
    pub(super) async fn volumes(&self, vmid: Vmid) -> Result<Vec<String>> {
        let mut volumes = Vec::new();
        for storage in self.storages().await? {
            volumes.extend(self.volumes_on(storage, vmid).await?);
        }
        Ok(volumes)
    }

    /// Volumes of this vmid, on these storages.
    pub(super) async fn volumes_among<'a>(
        &self,
        vmid: Vmid,
        names: impl Iterator<Item = &'a str>,
    ) -> Result<Vec<String>> {
        let names: BTreeSet<&str> = names.collect();
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let mut volumes = Vec::new();
        let storages = self.storages().await?;
        for storage in storages.into_iter().filter(|s| names.contains(s.name.as_str())) {
            volumes.extend(self.volumes_on(storage, vmid).await?);
        }
        Ok(volumes)
    }

    pub(super) async fn all_volumes(&self) -> Result<BTreeMap<Vmid, Vec<String>>> {
        let mut all = BTreeMap::<Vmid, Vec<String>>::new();
        for storage in self.storages().await? {
            for (vmid, volumes) in self.all_volumes_on(storage).await? {
                all.entry(vmid).or_default().extend(volumes);
            }
        }
        Ok(all)
    }

    pub(super) async fn clone_site(&self, template: Vmid, vmid: Vmid) -> Result<CloneSite> {
        let config = self.config(template).await?.ok_or_else(|| self.missing(template))?;
        let mut site = CloneSite { storages: config.storages(), volumes: Vec::new() };
        let looks = self.storages().await?.into_iter().map(async |storage| {
            let name = storage.name.clone();
            (name, self.volumes_on(storage, vmid).await)
        });
        for (name, seen) in join_all(looks).await {
            match seen {
                Ok(volumes) => site.volumes.extend(volumes),
                // A storage that the clone does not write to does not matter for undoing it.
                Err(error) if !site.storages.contains(&name) => {
                    tracing::warn!(storage = name, %vmid, %error, "could not list the volumes of a storage");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(site)
    }

    async fn volumes_on(&self, storage: Storage, vmid: Vmid) -> Result<Vec<String>> {
        match storage.place() {
            Place::Flat(_) | Place::Images(_) => {
                let name = storage.name.clone();
                let look = move || storage.volumes_seen(vmid).unwrap_or_else(|| Ok(Vec::new()));
                self.files.blocking(look).await.map_err(|error| unseen(&name, &error))
            }
            Place::Thin { group, .. } => {
                let text = self.tool(LVS, ["--noheadings", "-o", "lv_name", &group]).await?;
                let names = storage::parse_lvs(&text);
                Ok(names.filter_map(|name| storage.volume(vmid, name)).collect())
            }
            Place::Other => {
                let (pvesm, id) = (self.places.pvesm.clone(), vmid.to_string());
                let text = self.tool(pvesm, ["list", &storage.name, "--vmid", &id]).await?;
                Ok(storage::parse_pvesm_volumes(&text, &storage.name))
            }
        }
    }

    async fn all_volumes_on(&self, storage: Storage) -> Result<BTreeMap<Vmid, Vec<String>>> {
        match storage.place() {
            Place::Flat(_) | Place::Images(_) => {
                let name = storage.name.clone();
                let look =
                    move || storage.all_volumes_seen().unwrap_or_else(|| Ok(BTreeMap::new()));
                self.files.blocking(look).await.map_err(|error| unseen(&name, &error))
            }
            Place::Thin { group, .. } => {
                let text = self.tool(LVS, ["--noheadings", "-o", "lv_name", &group]).await?;
                Ok(storage.by_number(storage::parse_lvs(&text)))
            }
            Place::Other => {
                let pvesm = self.places.pvesm.clone();
                let text = self.tool(pvesm, ["list", &storage.name]).await?;
                let mut all = BTreeMap::<Vmid, Vec<String>>::new();
                for volume in storage::parse_pvesm_volumes(&text, &storage.name) {
                    let name = volume.rsplit([':', '/']).next().unwrap_or("");
                    if let Some(vmid) = volume::owner(name) {
                        all.entry(vmid).or_default().push(volume);
                    }
                }
                Ok(all)
            }
        }
    }

    /// Removes a volume that no config names.
    pub(super) async fn free(&self, volume: &str) -> Result<()> {
        self.tool(self.places.pvesm.clone(), ["free", volume]).await.map(drop)
    }

    pub(super) async fn tool<'a>(
        &self,
        path: impl Into<PathBuf>,
        arguments: impl IntoIterator<Item = &'a str>,
    ) -> Result<String> {
        let arguments = arguments.into_iter().map(Into::into).collect();
        let program = Program { path: path.into(), arguments };
        self.run(None, program, Instant::now() + CALL).await
    }
}

fn unseen(storage: &str, error: &std::io::Error) -> ErrorKind {
    ErrorKind::Failed(format!("storage '{storage}': {error}"))
}
