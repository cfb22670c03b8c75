//! RFC 6962 trees: the frontier that grows, the subtrees a proof is made of, and the checking of proofs. Pure; no I/O.

use crate::kernel::crypto::{self, Domain, Hash};

/// The hash of an inner node.
#[must_use]
pub fn node(left: &Hash, right: &Hash) -> Hash {
    crypto::hash(Domain::Node, &[left, right])
}

/// The right edge of a tree: the roots of its perfect subtrees, largest first. Enough to append and to give the root.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frontier {
    size: u64,
    nodes: Vec<Hash>,
}

impl Frontier {
    /// Appends a leaf hash.
    pub fn push(&mut self, leaf: Hash) {
        let mut hash = leaf;
        let mut full = self.size;
        // Each trailing one of the size is a perfect subtree that the new leaf completes into a larger one.
        while full & 1 == 1 {
            if let Some(left) = self.nodes.pop() {
                hash = node(&left, &hash);
            }
            full >>= 1;
        }
        self.nodes.push(hash);
        self.size += 1;
    }

    /// The root; of no leaves, SHA-256 of nothing.
    #[must_use]
    pub fn root(&self) -> Hash {
        fold(&self.nodes).unwrap_or_else(|| crypto::sha256(b""))
    }

    /// How many leaves.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// For storing.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        self.nodes.concat()
    }

    /// From what was stored; `None` if it does not fit the size.
    #[must_use]
    pub fn decode(bytes: &[u8], size: u64) -> Option<Self> {
        let (nodes, rest) = bytes.as_chunks::<32>();
        let fits = rest.is_empty() && nodes.len() as u32 == size.count_ones();
        fits.then(|| Self { size, nodes: nodes.to_vec() })
    }

    /// From the roots of the perfect subtrees of a tree of that size, as [`subtrees`]`(0, size)` names them.
    #[must_use]
    pub fn from_nodes(nodes: Vec<Hash>, size: u64) -> Option<Self> {
        (nodes.len() as u32 == size.count_ones()).then_some(Self { size, nodes })
    }
}

/// The root over adjacent perfect subtrees, largest first.
#[must_use]
pub fn fold(nodes: &[Hash]) -> Option<Hash> {
    let (last, rest) = nodes.split_last()?;
    Some(rest.iter().rev().fold(*last, |right, left| node(left, &right)))
}

/// The root over leaf hashes.
#[must_use]
pub fn root(leaves: &[Hash]) -> Hash {
    let mut frontier = Frontier::default();
    leaves.iter().for_each(|l| frontier.push(*l));
    frontier.root()
}

/// A perfect subtree: `2^level` leaves from `index * 2^level` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subtree {
    /// Its height.
    pub level: u32,
    /// Its place among those of its height.
    pub index: u64,
}

/// The perfect subtrees that make up the leaves from `start` to before `end`, where `start` is where a subtree of an RFC 6962
/// tree begins.
#[must_use]
pub fn subtrees(start: u64, end: u64) -> Vec<Subtree> {
    let mut out = Vec::new();
    let mut at = start;
    while at < end {
        let level = (end - at).ilog2();
        out.push(Subtree { level, index: at >> level });
        at += 1 << level;
    }
    out
}

/// The ranges of leaves whose roots are the inclusion proof of leaf `index` in a tree of `size`, from the leaf's sibling up
/// (RFC 6962, 2.1.1).
#[must_use]
pub fn inclusion(index: u64, size: u64) -> Vec<(u64, u64)> {
    let (mut start, mut end, mut path) = (0, size, Vec::new());
    while end - start > 1 {
        let split = start + largest_power_below(end - start);
        if index < split {
            path.push((split, end));
            end = split;
        } else {
            path.push((start, split));
            start = split;
        }
    }
    path.reverse();
    path
}

/// The ranges of leaves whose roots prove that the tree of `old` leaves is the beginning of that of `new` (RFC 6962, 2.1.2).
#[must_use]
pub fn consistency(old: u64, new: u64) -> Vec<(u64, u64)> {
    let (mut start, mut end, mut path, mut whole) = (0, new, Vec::new(), true);
    if old == 0 || old >= new {
        return path;
    }
    while old != end {
        let split = start + largest_power_below(end - start);
        if old <= split {
            path.push((split, end));
            end = split;
        } else {
            path.push((start, split));
            start = split;
            whole = false;
        }
    }
    if !whole {
        path.push((start, end));
    }
    path.reverse();
    path
}

/// The largest power of two smaller than `n`, for `n > 1`.
fn largest_power_below(n: u64) -> u64 {
    1 << (n - 1).ilog2()
}

/// Checks an inclusion proof (RFC 9162, 2.1.3.2).
#[must_use]
pub fn verify_inclusion(leaf: &Hash, index: u64, size: u64, proof: &[Hash], root: &Hash) -> bool {
    root_of(leaf, index, size, proof).as_ref() == Some(root)
}

/// The root that an inclusion proof leads to; `None` if it is not one of a tree of this size.
#[must_use]
pub fn root_of(leaf: &Hash, index: u64, size: u64, proof: &[Hash]) -> Option<Hash> {
    if index >= size {
        return None;
    }
    let (mut fnode, mut snode, mut hash) = (index, size - 1, *leaf);
    for p in proof {
        if snode == 0 {
            return None;
        }
        if fnode & 1 == 1 || fnode == snode {
            hash = node(p, &hash);
            while fnode & 1 == 0 && fnode != 0 {
                fnode >>= 1;
                snode >>= 1;
            }
        } else {
            hash = node(&hash, p);
        }
        fnode >>= 1;
        snode >>= 1;
    }
    (snode == 0).then_some(hash)
}

/// Checks a consistency proof (RFC 9162, 2.1.4.2).
#[must_use]
pub fn verify_consistency(old: u64, new: u64, old_root: &Hash, new_root: &Hash, proof: &[Hash]) -> bool {
    if old == new {
        return proof.is_empty() && old_root == new_root;
    }
    if old == 0 {
        return proof.is_empty();
    }
    if old > new {
        return false;
    }
    let mut path = proof.to_vec();
    if old.is_power_of_two() {
        path.insert(0, *old_root);
    }
    let (mut fnode, mut snode) = (old - 1, new - 1);
    while fnode & 1 == 1 {
        fnode >>= 1;
        snode >>= 1;
    }
    let Some((first, rest)) = path.split_first() else { return false };
    let (mut from, mut to) = (*first, *first);
    for p in rest {
        if snode == 0 {
            return false;
        }
        if fnode & 1 == 1 || fnode == snode {
            from = node(p, &from);
            to = node(p, &to);
            while fnode & 1 == 0 && fnode != 0 {
                fnode >>= 1;
                snode >>= 1;
            }
        } else {
            to = node(&to, p);
        }
        fnode >>= 1;
        snode >>= 1;
    }
    snode == 0 && from == *old_root && to == *new_root
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, word for word: MTH of RFC 6962, 2.1.
    fn mth(leaves: &[Hash]) -> Hash {
        match leaves {
            [] => crypto::sha256(b""),
            [one] => *one,
            more => {
                let k = largest_power_below(more.len() as u64) as usize;
                node(&mth(&more[..k]), &mth(&more[k..]))
            }
        }
    }

    fn leaves(n: u64) -> Vec<Hash> {
        (0..n).map(|i| crypto::hash(Domain::Leaf, &[&i.to_be_bytes()])).collect()
    }

    fn ranges(path: Vec<(u64, u64)>, leaves: &[Hash]) -> Vec<Hash> {
        let of = |s: &Subtree| mth(&leaves[(s.index << s.level) as usize..((s.index + 1) << s.level) as usize]);
        path.into_iter().map(|(a, b)| fold(&subtrees(a, b).iter().map(of).collect::<Vec<_>>()).unwrap()).collect()
    }

    #[test]
    fn known_roots() {
        let hex = |h: Hash| h.iter().map(|b| format!("{b:02x}")).collect::<String>();
        assert_eq!(hex(Frontier::default().root()), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        // The test vectors of Certificate Transparency: eight leaves.
        let data: [&[u8]; 8] = [
            b"",
            b"\x00",
            b"\x10",
            b"\x20\x21",
            b"\x30\x31",
            b"\x40\x41\x42\x43",
            b"\x50\x51\x52\x53\x54\x55\x56\x57",
            b"\x60\x61\x62\x63\x64\x65\x66\x67\x68\x69\x6a\x6b\x6c\x6d\x6e\x6f",
        ];
        let all: Vec<Hash> = data.iter().map(|d| crypto::hash(Domain::Leaf, &[d])).collect();
        assert_eq!(hex(root(&all[..1])), "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d");
        assert_eq!(hex(root(&all)), "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328");
    }

    proptest! {
        #[test]
        fn the_frontier_gives_the_root(n in 0u64..300) {
            let all = leaves(n);
            prop_assert_eq!(root(&all), mth(&all));
            let mut f = Frontier::default();
            all.iter().for_each(|l| f.push(*l));
            prop_assert_eq!(Frontier::decode(&f.encode(), n), Some(f.clone()));
            prop_assert_eq!(Frontier::decode(&f.encode()[1.min(f.encode().len())..], n).is_some(), n == 0);
            let nodes = ranges(subtrees(0, n).iter().map(|s| (s.index << s.level, (s.index + 1) << s.level)).collect(), &all);
            prop_assert_eq!(Frontier::from_nodes(nodes, n), Some(f));
        }

        #[test]
        fn inclusion_proofs_verify_and_only_them(n in 1u64..200, i in 0u64..200, other in 0u64..200, bit in 0usize..256) {
            let (i, all) = (i % n, leaves(n));
            let (top, proof) = (mth(&all), ranges(inclusion(i, n), &all));
            prop_assert!(verify_inclusion(&all[i as usize], i, n, &proof, &top));
            let other = other % n;
            if other != i {
                prop_assert!(!verify_inclusion(&all[other as usize], i, n, &proof, &top));
                prop_assert!(!verify_inclusion(&all[i as usize], other, n, &proof, &top));
            }
            prop_assert!(!verify_inclusion(&all[i as usize], n, n, &proof, &top));
            if !proof.is_empty() {
                let mut bad = proof.clone();
                bad[bit % proof.len()][bit / 8] ^= 1 << (bit % 8);
                prop_assert!(!verify_inclusion(&all[i as usize], i, n, &bad, &top));
                prop_assert!(!verify_inclusion(&all[i as usize], i, n, &proof[1..], &top));
            }
        }

        #[test]
        fn consistency_proofs_verify_and_only_them(n in 1u64..200, m in 0u64..200, bit in 0usize..256) {
            let (m, all) = (m % (n + 1), leaves(n));
            let (old, new) = (mth(&all[..m as usize]), mth(&all));
            let proof = ranges(consistency(m, n), &all);
            prop_assert!(verify_consistency(m, n, &old, &new, &proof));
            if !proof.is_empty() {
                let mut bad = proof.clone();
                bad[bit % proof.len()][bit / 8] ^= 1 << (bit % 8);
                prop_assert!(!verify_consistency(m, n, &old, &new, &bad));
                let mut forged = new;
                forged[0] ^= 1;
                prop_assert!(!verify_consistency(m, n, &old, &forged, &proof));
            }
        }
    }
}
