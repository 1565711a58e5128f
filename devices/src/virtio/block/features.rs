//! Feature bits of the block device (virtio 1.3, section 5.2.3).

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_GEOMETRY, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use tandem_block::Limits;

use crate::virtio::{
    FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, FEATURE_RING_RESET, FEATURE_VERSION_1,
};

pub(super) const SEG_MAX: u64 = 1 << VIRTIO_BLK_F_SEG_MAX;
pub(super) const GEOMETRY: u64 = 1 << VIRTIO_BLK_F_GEOMETRY;
pub(super) const RO: u64 = 1 << VIRTIO_BLK_F_RO;
pub(super) const BLK_SIZE: u64 = 1 << VIRTIO_BLK_F_BLK_SIZE;
pub(super) const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
pub(super) const TOPOLOGY: u64 = 1 << VIRTIO_BLK_F_TOPOLOGY;
pub(super) const CONFIG_WCE: u64 = 1 << VIRTIO_BLK_F_CONFIG_WCE;
pub(super) const MQ: u64 = 1 << VIRTIO_BLK_F_MQ;
pub(super) const DISCARD: u64 = 1 << VIRTIO_BLK_F_DISCARD;
pub(super) const WRITE_ZEROES: u64 = 1 << VIRTIO_BLK_F_WRITE_ZEROES;

/// What the device offers for a disk of these limits.
pub(super) fn offered(limits: &Limits) -> u64 {
    let only_if = |condition, features| if condition { features } else { 0 };
    FEATURE_VERSION_1
        | FEATURE_INDIRECT_DESC
        | FEATURE_EVENT_IDX
        | FEATURE_RING_RESET
        | SEG_MAX
        | GEOMETRY
        | BLK_SIZE
        | TOPOLOGY
        | MQ
        | only_if(limits.read_only, RO)
        | only_if(limits.write_cache, FLUSH | CONFIG_WCE)
        | only_if(!limits.read_only, DISCARD | WRITE_ZEROES)
}
